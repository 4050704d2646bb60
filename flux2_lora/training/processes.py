"""Several processes, on one machine or many, that train as one: each computes its share of every batch.

Only the adapters have gradients, so one exchange a step of a few dozen MB is all that they say to each other: the mean
of the gradients, of the loss, and whether one of them was told to stop. The frozen base is whole in each of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor

from flux2_lora.errors import UserError

_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


@dataclass(frozen=True)
class Processes:
    """The processes of a run as Accelerate has set them up."""

    accelerator: Accelerator

    @property
    def count(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return bool(self.accelerator.is_main_process)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    @property
    def words(self) -> str:
        """Where they compute: "cpu", "cuda in 2 processes"."""
        return self.device.type + (f" in {self.count} processes" if self.count > 1 else "")

    @contextmanager
    def first_one_first(self) -> Iterator[None]:
        """The first process runs the body, then the others do, who find its files."""
        with self.accelerator.main_process_first():
            yield

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over the processes; the same in all of them."""
        if self.count == 1:
            return tensor
        mean: Tensor = self.accelerator.reduce(tensor, reduction="mean")
        return mean

    def agreed(self, flag: bool) -> bool:  # noqa: FBT001 - the flag is what is exchanged
        """Whether any of the processes says so; each must ask."""
        if self.count == 1:
            return flag
        return bool(self.mean(torch.tensor(float(flag), device=self.device)) > 0)


def open_processes(device: torch.device, expected: int | None) -> Processes:
    """Join the processes that torchrun or `accelerate launch` started; UserError unless there are as many as asked for.

    `accelerate launch --cpu --num_processes 2` starts one process and says nothing, hence `expected`.
    """
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        # Blocks compute in the type of their inputs. Autocast would widen every norm to float32 on a CUDA device, and
        # with it what follows: a block would keep the bytes of 50 to 54 tensors of all its tokens, and not of 20 to 25.
        mixed_precision="no",
        # The loss of a micro step is divided where it is taken; a variable of the environment would divide it again.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        # The first process may encode pictures for hours while the others wait for it.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=2))],
    )
    if accelerator.distributed_type in _SHARDED:
        raise UserError(
            f"{accelerator.distributed_type} would shard the base, and quantised weights are not sharded",
            "launch with torchrun, or accelerate launch --multi_gpu: each process holds the whole base",
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched or (expected is not None and accelerator.num_processes != expected):
        raise UserError(
            f"this run has {accelerator.num_processes} processes, and {expected or launched} were asked for",
            f"launch it with torchrun --nproc-per-node {expected or launched} -m flux2_lora train ...",
        )
    return Processes(accelerator)
