"""What is traded for memory during training."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flux2_lora.options import option


@dataclass(frozen=True, kw_only=True)
class MemorySpec:
    """gradient_checkpointing: on recomputes each block in backward instead of keeping it; auto: on but on a CPU."""

    gradient_checkpointing: str = option("auto", one_of=("auto", "on", "off"))

    def checkpointing(self, device: torch.device) -> bool:
        """Whether blocks are recomputed on this device."""
        return self.gradient_checkpointing == "on" or (self.gradient_checkpointing == "auto" and device.type != "cpu")
