"""The weights that are shown: what validation, previews, checkpoints' adapters and the export use.

Without averaging they are the weights that are trained. An EMA (Polyak & Juditsky 1992) and schedule-free AdamW
(Defazio et al. 2024, arXiv:2405.15682) train one set of weights and mean another.

Law: looking changes nothing. The trained weights are copied aside and put back, bit for bit; turning an average back
into what it was made of would not be exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Ema:
    """Exponential moving average of parameters, over the last 1 / (1 - decay) steps or so.

    The decay grows towards its value, min(decay, (1 + n) / (10 + n)) after n updates, so that the start is forgotten.
    """

    def __init__(self, decay: float, parameters: Sequence[nn.Parameter]) -> None:
        self.decay, self.updates = decay, 0
        self._parameters: list[Tensor] = list(parameters)
        self.average = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.average, self._parameters, 1 - decay)

    @torch.no_grad()
    def restore(self, average: Sequence[Tensor], updates: int) -> None:
        """Go on from a checkpoint's average."""
        self.updates = updates
        for mine, other in zip(self.average, average, strict=True):
            mine.copy_(other)


def averages(optimizer: torch.optim.Optimizer, ema: Ema | None) -> bool:
    """Whether the weights that are shown are others than those that are trained."""
    return ema is not None or _schedule_free(optimizer)


@contextmanager
@torch.no_grad()
def shown(optimizer: torch.optim.Optimizer, ema: Ema | None, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """While active, the parameters hold the weights that are shown."""
    if not averages(optimizer, ema):
        yield
        return
    trained = [parameter.detach().clone() for parameter in parameters]
    inner: Any = optimizer
    if ema is not None:
        for parameter, average in zip(parameters, ema.average, strict=True):
            parameter.copy_(average)
    else:
        inner.eval()
    try:
        yield
    finally:
        for parameter, value in zip(parameters, trained, strict=True):
            parameter.copy_(value)
        if ema is None:
            for group in optimizer.param_groups:
                group["train_mode"] = True


def _schedule_free(optimizer: torch.optim.Optimizer) -> bool:
    return "train_mode" in optimizer.param_groups[0]
