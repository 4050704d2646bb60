"""A LoRA at a lower rank: of each update, the best approximation of that rank (Eckart-Young), by SVD of its factors.

Linears that share a weight of BFL's and one A, as in files whose trainer adapts the fused weight, are resized as one,
so that they share one afterwards too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from flux2_lora.adapters import LoraWeights
from flux2_lora.keys import bfl_of, members_of


def resized(modules: Mapping[str, LoraWeights], rank: int, architecture: str) -> tuple[dict[str, LoraWeights], float]:
    """(updates of at most that rank, |what is lost| / |all updates| in Frobenius norms). Others stay as they are."""
    smaller: dict[str, LoraWeights] = {}
    lost = whole = 0.0
    for group in _groups(modules, architecture):
        pairs = [modules[module] for module in group]
        fused = LoraWeights(
            down=pairs[0].down, up=torch.cat([pair.scale * pair.up.double() for pair in pairs]), scale=1.0
        )
        pair, gone, there = _cut(fused, rank)
        lost, whole = lost + gone, whole + there
        if gone == 0:
            smaller |= {module: modules[module] for module in group}
            continue
        ups = pair.up.split([len(one.up) for one in pairs])
        smaller |= {m: LoraWeights(down=pair.down, up=up, scale=1.0) for m, up in zip(group, ups, strict=True)}
    return {module: smaller[module] for module in modules}, math.sqrt(lost / whole) if whole else 0.0


def _groups(modules: Mapping[str, LoraWeights], architecture: str) -> Iterator[Sequence[str]]:
    """Linears that are resized together."""
    done: set[str] = set()
    for module in modules:
        if module in done:
            continue
        members = members_of(architecture, bfl_of(architecture, module).module)
        there = [member for member in members if member in modules]
        shared = len(there) == len(members) and all(
            torch.equal(modules[member].down, modules[module].down) for member in members
        )
        group = there if shared else [module]
        done |= set(group)
        yield group


def _cut(pair: LoraWeights, rank: int) -> tuple[LoraWeights, float, float]:
    """(the pair at that rank, squared norm of what is lost, of all): B A = Q1 (R1 R2') Q2', and R1 R2' is small."""
    left, right = torch.linalg.qr(pair.up.double()), torch.linalg.qr(pair.down.double().T)
    u, values, v = torch.linalg.svd(left.R @ right.R.T)
    whole = float(values.square().sum())
    if len(pair.down) <= rank:
        return pair, 0.0, whole
    root = values[:rank].sqrt()
    up, down = left.Q @ (u[:, :rank] * root), (root[:, None] * v[:rank]) @ right.Q.T
    return LoraWeights(down=down.float(), up=up.float(), scale=1.0), float(values[rank:].square().sum()), whole
