"""A LoRA at a lower rank: of each update, the best approximation of that rank (Eckart-Young), by SVD of its factors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from flux2_lora.adapters import LoraWeights


def resized(modules: Mapping[str, LoraWeights], rank: int) -> tuple[dict[str, LoraWeights], float]:
    """(updates of at most that rank, |what is lost| / |all updates| in Frobenius norms). Others stay as they are.

    With s B = Q1 R1 and A' = Q2 R2, the singular values of R1 R2' are those of s B A.
    """
    smaller, lost, whole = {}, 0.0, 0.0
    for module, pair in modules.items():
        left, right = torch.linalg.qr(pair.scale * pair.up.double()), torch.linalg.qr(pair.down.double().T)
        u, values, v = torch.linalg.svd(left.R @ right.R.T)
        whole += float(values.square().sum())
        if len(pair.down) <= rank:
            smaller[module] = pair
            continue
        lost += float(values[rank:].square().sum())
        root = values[:rank].sqrt()
        up, down = left.Q @ (u[:, :rank] * root), (root[:, None] * v[:rank]) @ right.Q.T
        smaller[module] = LoraWeights(down=down.float(), up=up.float(), scale=1.0)
    return smaller, math.sqrt(lost / whole) if whole else 0.0
