"""What `flux2-lora plan` says of a case on a card, as the command prints it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from flux2_lora.benchmark.cases import OPTIMIZER, RANK, SMALL, Case, Shape
from flux2_lora.benchmark.rates import Rates
from flux2_lora.benchmark.worker import last_line


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the command chose for a card, or why there is nothing. peak: bytes with the driver's context."""

    resident: int = 0
    slots: int = 2
    plain: int = 0
    peak: float = 0.0
    step_s: float = 0.0
    failed: str = ""


def asking_plan(
    model: Shape, case: Case, rates: Rates, folder: Path, *, small: bool
) -> tuple[subprocess.Popen[str], Path]:
    """Start `flux2-lora plan` for a case on a card with the rates of this one."""
    told = folder / f"{model.page}-{case.card}.json"
    geometry = {**model.geometry, **(SMALL if small else {})}
    options = [
        *(f"model={model.page}", "model.path=not_here", f"hardware={case.card}gb", f"output={told}", "preview.every=0"),
        *(f"model.geometry.{key}={json.dumps(value)}" for key, value in geometry.items()),
        *(f"hardware.copy_gb_s={rates.copy / 1e9}", f"hardware.bf16_tflops={rates.flops / 1e12}"),
        *("hardware.utilisation=1", "hardware.host_gb=64", f"adapter.rank={RANK}", f"optimizer={OPTIMIZER}"),
        *(f"batch_size={case.batch}", f"dataset.resolution={case.px}"),
    ]
    command = [sys.executable, "-m", "flux2_lora", "plan", *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True), told


def plan_of(process: subprocess.Popen[str], told: Path) -> Plan:
    _, errors = process.communicate()
    if process.returncode:
        return Plan(failed=f"no plan: {last_line(errors)}")
    plan = json.loads(told.read_text())
    return Plan(
        resident=plan["resident_blocks"],
        slots=max(plan["slots"], 1),
        plain=plan["plain_blocks"],
        peak=plan["vram_bytes"]["peak"],
        step_s=plan["step_s"],
    )
