"""The layer that computes W x + scale * B A x, under PEFT's names and rules.

Laws: the update is added by the multiplication that makes it (addmm), not by one that writes scale * B A x and another
that adds it. For a wide projection these passes over its output cost as much as B A x itself. And A and B are rounded
to the type of x, not x widened to theirs: autograd then keeps x itself, once for all projections that read it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional as F


class LoraLinear(lora.Linear):  # type: ignore[misc, unused-ignore]
    """PEFT's Linear adapter with its update added in place of written out; same parameters, same switches.

    x: [... in] -> [... out], in the type of the base layer's output.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged or args or kwargs:
            whole: Tensor = super().forward(x, *args, **kwargs)
            return whole
        base: Tensor = self.base_layer(x)
        result = base.flatten(0, -2)
        for name in self.active_adapters:
            if name in self.lora_A:
                down, up = cast("nn.Linear", self.lora_A[name]), cast("nn.Linear", self.lora_B[name])
                small = F.linear(self.lora_dropout[name](x), down.weight.to(x.dtype)).flatten(0, -2)
                result = torch.addmm(
                    result, small.to(result.dtype), up.weight.T.to(result.dtype), alpha=self.scaling[name]
                )
        return result.to(base.dtype).view(base.shape)
