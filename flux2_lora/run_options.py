"""All options of a run, which `train` takes and `plan` looks at; and the plan of memory that they ask for.

configs/train.yaml has the defaults, and each group its own page beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from flux2_lora.adapters import AdapterSpec
from flux2_lora.caches import CacheSpec
from flux2_lora.dataset import DatasetSpec
from flux2_lora.families import ModelSpec, Outline, outline
from flux2_lora.flow import LossSpec, TimestepSpec
from flux2_lora.inference.previews import EDITED, PreviewSpec
from flux2_lora.options import option
from flux2_lora.planning.choose import choose
from flux2_lora.planning.hardware import Card, HardwareSpec, card_of
from flux2_lora.planning.memory import Learning
from flux2_lora.planning.work import Given, Plan, Previews, Work
from flux2_lora.quantize import PrecisionSpec
from flux2_lora.training.memory import MemorySpec
from flux2_lora.training.optimizers import OptimizerSpec, state_bytes
from flux2_lora.training.tracking import LoggerSpec
from flux2_lora.training.validation import ValidationSpec


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Every option of `train`. from: a file that this program exported, whose run is made again.

    hardware: the budget that memory is planned for, measured on the device where it says nothing.
    """

    model: ModelSpec
    dataset: DatasetSpec
    adapter: AdapterSpec
    optimizer: OptimizerSpec
    timesteps: TimestepSpec
    loss: LossSpec
    precision: PrecisionSpec
    memory: MemorySpec
    hardware: HardwareSpec
    validation: ValidationSpec
    preview: PreviewSpec
    logger: LoggerSpec
    name: str
    cache: CacheSpec
    output_dir: str = "outputs"
    seed: int = option(0, at_least=0)
    device: str = "auto"
    processes: int | None = option(None, at_least=1)
    max_steps: int = option(1000, at_least=1)
    batch_size: int = option(1, at_least=1)
    grad_accumulation: int = option(1, at_least=1)
    checkpoint_every: int = option(100, at_least=1)
    keep_last: int = option(3, at_least=0)
    keep_best: bool = True
    checks: bool = True
    resume: str = "auto"
    from_: str | None = None
    allow_change: bool = False
    loader_workers: int = option(0, at_least=0)

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return Path(self.output_dir).expanduser() / self.name

    @property
    def exported(self) -> Path:
        """The file that the run ends in."""
        return self.folder / "export" / f"{self.name}.safetensors"

    def work(self, shape: Outline) -> Work:
        """The run as the planner sees it. shape: of the model."""
        preview = self.preview
        return Work(
            outline=shape,
            adapter=self.adapter,
            precision=self.precision,
            learning=Learning(
                state_bytes=state_bytes(self.optimizer),
                graphs=2 if self.loss.preserve else 1,
                accumulates=self.grad_accumulation > 1,
            ),
            previews=Previews(
                every=preview.every,
                pictures=preview.count + EDITED * preview.edits * preview.fill.passes,
                steps=preview.steps,
                passes=2 if preview.cfg_scale > 1 else 1,
            ),
            resolution=self.dataset.side_px,
            batch_size=self.batch_size,
            grad_accumulation=self.grad_accumulation,
            max_steps=self.max_steps,
            given=Given(
                resident=self.memory.resident_blocks,
                slots=self.memory.slots,
                plain=self.memory.plain_blocks,
                host=self.memory.host,
                block_inputs=self.memory.block_inputs,
            ),
            matmul="fp8" if self.precision.matmul == "fp8" else "bf16",
        )


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The plan that a run follows where its options leave memory open, and the card that it was made for."""

    plan: Plan
    card: Card


def budget_of(config: RunOptions, device: torch.device) -> Budget | None:
    """The fastest plan for the device; UserError where none fits.

    None where nothing is left to choose: all of `memory` is given, or the device is a CPU, which has one memory for all
    and computes nothing twice, unless hardware.vram_gb limits it.
    """
    memory = config.memory
    given = None not in (memory.resident_blocks, memory.slots, memory.plain_blocks)
    if given or (device.type == "cpu" and config.hardware.vram_gb is None):
        return None
    card = card_of(config.hardware, device)
    return Budget(plan=choose(config.work(outline(config.model)), card).chosen, card=card)
