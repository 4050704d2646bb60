"""What is left of an update when the host model stores its weights in 8 or 4 bits.

A host that merges adds the update to its weights and rounds the sum again: E = Q(W + D) - Q(W) stands for D. Where D is
smaller than the steps of Q, most weights stay as they were and a few jump by a whole step: on average D is kept, under
noise. A host that does not merge adds D x in bfloat16, whatever its weights are stored in.

    kept    <E, D> / <D, D>        1 where D comes through at its full strength
    noise   |E - D| / |D|          above 1, rounding outweighs the update
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flux2_lora.adapters import LoraWeights
from flux2_lora.matmul import E4M3
from flux2_lora.quantize import rounded_to
from flux2_lora.weights import Weights

_LOUD = 1.0


def _raw_fp8(weight: Tensor) -> Tensor:
    """Cast without a scale, as plain fp8 files are made."""
    largest = torch.finfo(E4M3).max
    return weight.clamp(-largest, largest).to(E4M3).float()


HOSTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "fp8": _raw_fp8,
    "fp8_scaled": lambda weight: rounded_to("fp8", weight),
    "int8": lambda weight: rounded_to("int8", weight),
    "nf4": lambda weight: rounded_to("nf4", weight),
}
"""How a host stores W [out in], as float32."""


@dataclass(frozen=True, kw_only=True)
class Survival:
    """Of one block in one host. block: "double 3" or "single 11"."""

    host: str
    block: str
    kept: float
    noise: float
    unmerged_noise: float


def survival(weights: Weights, modules: Mapping[str, LoraWeights], hosts: list[str]) -> list[Survival]:
    """By host and block; weights: of the base, as the user has it. One weight is in memory at a time."""
    sums: dict[tuple[str, str], Tensor] = {}
    for module, pair in modules.items():
        base = weights.read(f"{module}.weight").dense(torch.float32)
        update = pair.scale * pair.up.float() @ pair.down.float()
        live = (pair.scale * pair.up.float()).bfloat16().float() @ pair.down.bfloat16().float()
        for host in hosts:
            merged = HOSTS[host](base + update) - HOSTS[host](base)
            parts = [(merged * update).sum(), (merged - update).square().sum(), (live - update).square().sum()]
            found = torch.stack([*parts, update.square().sum()]).double()
            place = host, block_of(module)
            sums[place] = sums[place] + found if place in sums else found
    return [
        Survival(
            host=host,
            block=block,
            kept=float(total[0] / total[3]),
            noise=math.sqrt(float(total[1] / total[3])),
            unmerged_noise=math.sqrt(float(total[2] / total[3])),
        )
        for (host, block), total in sorted(sums.items(), key=lambda entry: in_order(entry[0][1]))
    ]


def block_of(module: str) -> str:
    """ "double 3" of transformer_blocks.3.attn.to_q; the module's own name outside the blocks."""
    found = re.match(r"(single_)?transformer_blocks\.(\d+)\.", module)
    return f"{'single' if found[1] else 'double'} {found[2]}" if found else module


def in_order(block: str) -> tuple[str, int]:
    """Sorts double blocks before single ones, by number."""
    stack, _, number = block.partition(" ")
    return stack, int(number) if number.isdigit() else 0


def advice(found: list[Survival]) -> list[str]:
    """One line a host, the worst block named."""
    lines = []
    for host in dict.fromkeys(one.host for one in found):
        worst = max((one for one in found if one.host == host), key=lambda one: one.noise)
        said = f"{host}: merged, rounding adds noise of {worst.noise:.2f} x the update in {worst.block}"
        if worst.noise > _LOUD:
            said += "; keep the LoRA unmerged there, or use a bf16 model"
        lines.append(f"{said}; unmerged {max(one.unmerged_noise for one in found if one.host == host):.4f} x")
    return lines
