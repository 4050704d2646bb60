"""What the text encoders hand to the transformer, as one value that can be sliced, stacked and moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """embeds: [b s d] text states of one fixed padded length; pooled: [b p] or None."""

    embeds: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, index: slice) -> Conditioning:
        return Conditioning(embeds=self.embeds[index], pooled=None if self.pooled is None else self.pooled[index])

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Conditioning:
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        return Conditioning(embeds=self.embeds.to(device, dtype), pooled=pooled)

    def repeat(self, times: int) -> Conditioning:
        """[b ...] -> [times * b ...], the whole batch after itself."""
        pooled = None if self.pooled is None else self.pooled.repeat(times, 1)
        return Conditioning(embeds=self.embeds.repeat(times, 1, 1), pooled=pooled)


def stack(parts: Sequence[Conditioning]) -> Conditioning:
    """Concatenate along the batch."""
    pooled = [part.pooled for part in parts if part.pooled is not None]
    return Conditioning(embeds=torch.cat([part.embeds for part in parts]), pooled=torch.cat(pooled) if pooled else None)
