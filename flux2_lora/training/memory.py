"""What is traded for memory and speed during training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from flux2_lora.options import option


@dataclass(frozen=True, kw_only=True)
class MemorySpec:
    """gradient_checkpointing: on recomputes each block in backward instead of keeping it; auto: on but on a CPU.

    compile: torch.compile of every block; its first steps take minutes, and it needs a compiler that PyTorch can use.
    """

    gradient_checkpointing: str = option("auto", one_of=("auto", "on", "off"))
    compile: bool = False

    def checkpointing(self, device: torch.device) -> bool:
        """Whether blocks are recomputed on this device."""
        return self.gradient_checkpointing == "on" or (self.gradient_checkpointing == "auto" and device.type != "cpu")


def compile_blocks(transformer: nn.Module, backend: str = "inductor", *, fullgraph: bool = False) -> None:
    """Compile the forward of every member of the model's ModuleLists; blocks of one kind share the compiled code.

    Frozen Linears keep their bytes in the graph: nothing that autograd saves is as wide as W.
    """
    for stack in transformer.children():
        if isinstance(stack, nn.ModuleList):
            for block in stack:
                block.forward = torch.compile(block.forward, backend=backend, fullgraph=fullgraph)
