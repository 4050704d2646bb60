"""The base with adapters folded in, as one file in BFL's names, which ComfyUI, Forge and from_single_file read.

Law: W' = W + scale * B A, summed in float32 and rounded once; every other tensor is the base's. One weight is in memory
at a time, so a model of 24 GB is written beside a few hundred MB.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flux2_lora.adapters import LoraWeights
from flux2_lora.files import write_in_turn
from flux2_lora.keys import ARCHITECTURES, bfl_of, members_of
from flux2_lora.weights import Weights


@dataclass(frozen=True, kw_only=True)
class _Fused:
    """A tensor of the file: the base's tensors of which it is made, by rows, and whether its halves are exchanged."""

    names: tuple[str, ...]
    swapped: bool


def write_merged(
    path: Path, weights: Weights, modules: Mapping[str, LoraWeights], architecture: str, dtype: torch.dtype
) -> None:
    """Write the whole transformer; KeyError for a tensor that the architecture's table does not know."""
    fused = _fused(weights, architecture)
    shapes = {key: _shape(weights, part) for key, part in fused.items()}

    def tensor(key: str) -> Tensor:
        rows = torch.cat([_with_update(weights, name, modules) for name in fused[key].names])
        return (torch.cat(rows.chunk(2)[::-1]) if fused[key].swapped else rows).to(dtype)

    write_in_turn(path, shapes, dtype, tensor, {"format": "pt"})


def _fused(weights: Weights, architecture: str) -> dict[str, _Fused]:
    """BFL's key -> what it is made of."""
    norms = ARCHITECTURES[architecture].norms
    found: dict[str, _Fused] = {}
    for name in weights.shapes:
        module, _, leaf = name.rpartition(".")
        place = bfl_of(architecture, module)
        is_norm = any(module.endswith(norm.rpartition("*")[2]) for norm in norms)
        members = members_of(architecture, place.module)
        names = tuple(f"{member}.{leaf}" for member in members)
        found[f"{place.module}.{'scale' if is_norm else leaf}"] = _Fused(names=names, swapped=place.swapped)
    return found


def _shape(weights: Weights, part: _Fused) -> tuple[int, ...]:
    shapes = [weights.shapes[name] for name in part.names]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _with_update(weights: Weights, name: str, modules: Mapping[str, LoraWeights]) -> Tensor:
    base = weights.read(name).dense(torch.float32)
    update = modules.get(name.removesuffix(".weight"))
    return base if update is None else base + update.scale * update.up.float() @ update.down.float()
