"""Two real processes train as one with twice the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from safetensors.torch import load_file

from flux2_lora.errors import UserError
from flux2_lora.training import processes
from tests.conftest import Command

LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
COMMON = ("device=cpu", "max_steps=5", "preview.every=0", "validation.every=5", "validation.most=2", "name=shared")


def launch(folder: Path, port: int, *options: str) -> subprocess.CompletedProcess[str]:
    """Train in two processes that meet at `port`."""
    return subprocess.run(
        [*LAUNCHER, "--master-port", str(port), "-m", "flux2_lora", "train", *options],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_from_twice_the_batch(command: Command, tmp_path: Path) -> None:
    """Five steps of 28 pictures by 6, so the last batch of the epoch is short, and one process has less to do."""
    launched = launch(tmp_path, 29511, *COMMON, "batch_size=3", "processes=2", "output_dir=two")
    assert launched.returncode == 0, launched.stdout + launched.stderr
    assert "on cpu in 2 processes" in launched.stdout
    assert launched.stdout.count("checks passed") == 1
    assert command("train", *COMMON, "batch_size=6", "output_dir=one").code == 0

    both = [load_file(f"{name}/shared/checkpoints/step-000005/adapter.safetensors") for name in ("one", "two")]
    for name, tensor in both[0].items():
        torch.testing.assert_close(both[1][name], tensor, rtol=2e-3, atol=2e-5)
    losses = [
        [json.loads(line) for line in Path(f"{name}/shared/metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    pairs = list(zip(*losses, strict=True))
    assert [one["step"] for one, _ in pairs] == [two["step"] for _, two in pairs]
    assert [two.get("loss") for _, two in pairs] == [
        None if one.get("loss") is None else pytest.approx(one["loss"], rel=1e-4) for one, _ in pairs
    ]


@pytest.mark.slow
def test_two_processes_end_early_together(tmp_path: Path) -> None:
    """At a rate that moves nothing, so that the first evaluation stays the best; only the first process sees it."""
    calm = ("optimizer.lr=1e-12", "optimizer.warmup_steps=0", "checks=false", "batch_size=1", "validation.base_style=0")
    waiting = ("validation.every=1", "validation.patience=1", "validation.most=2", "preview.every=0", "max_steps=9")
    launched = launch(tmp_path, 29513, "device=cpu", *calm, *waiting, "name=early")
    assert launched.returncode == 0, launched.stdout + launched.stderr
    assert (tmp_path / "outputs/early/export/early.safetensors").is_file()


def test_sharded_bases_are_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(distributed_type=DistributedType.FSDP, num_processes=2)
    monkeypatch.setattr(processes, "Accelerator", lambda **_: fake)
    with pytest.raises(UserError, match="quantised weights are not sharded"):
        processes.open_processes(torch.device("cpu"), None)


@pytest.mark.parametrize(("found", "launched", "expected"), [(1, "2", None), (1, "1", 2), (2, "2", 4)])
def test_another_number_of_processes_than_was_asked_for_is_refused(
    monkeypatch: pytest.MonkeyPatch, found: int, launched: str, expected: int | None
) -> None:
    fake = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU, num_processes=found)
    monkeypatch.setattr(processes, "Accelerator", lambda **_: fake)
    monkeypatch.setenv("WORLD_SIZE", launched)
    with pytest.raises(UserError, match=f"this run has {found} processes"):
        processes.open_processes(torch.device("cpu"), expected)
