"""The tensors of an exported file, in each of the forms that clients read.

    universal   lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight, .lora_up.weight, .alpha
    comfyui     diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight, .lora_B.weight
    diffusers   transformer.transformer_blocks.0.attn.to_q.lora_A.weight, .lora_B.weight
    peft        transformer_blocks.0.attn.to_q.lora_A.weight, .lora_B.weight, alpha in the header

Law: what a file does to every weight is scale * B A of the adapter. The scale is folded into B before the cast, since
some clients never see an alpha: a power of two costs nothing there. kohya's alpha is the rank of each matrix as it is
written, so that alpha / rank is 1. `peft` is the adapter as it was trained, for this program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from flux2_lora.adapters import Lora, LoraWeights
from flux2_lora.errors import UserError, listed
from flux2_lora.keys import bfl_of, is_target, kohya_of, members_of

_REMEDY = "give a run of this program (adapter=outputs/<name>), one of its checkpoints, or a LoRA of a known naming"


def modules_of(state: Mapping[str, Tensor], rank: int, alpha: float) -> dict[str, LoraWeights]:
    """Pair PEFT's tensors <module>.lora_A.weight [r in] and <module>.lora_B.weight [out r] by module.

    Groups may have ranks of their own; alpha / rank is the scale of all. Raises UserError for other tensors, a missing
    half, shapes that are no pair, and values not finite.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        module, _, half = key.rpartition(".lora_")
        factors.setdefault(module, {})[half] = tensor
    others = [key for key in state if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    _refuse("other tensors than lora_A.weight and lora_B.weight:", others)
    _refuse("only one of lora_A and lora_B of", [module for module, halves in factors.items() if len(halves) != 2])
    modules = {
        module: LoraWeights(down=halves["A.weight"], up=halves["B.weight"], scale=alpha / rank)
        for module, halves in factors.items()
    }
    _refuse("pairs other than [rank in] and [out rank] of", [m for m, lora in modules.items() if not _is_pair(lora)])
    infinite = [key for key, tensor in state.items() if not tensor.isfinite().all()]
    _refuse(
        "values that are not finite in", infinite, "export an earlier checkpoint, and train with a lower optimizer.lr"
    )
    if not modules:
        raise UserError("the adapter holds no tensors", _REMEDY)
    return modules


def universal(modules: Mapping[str, LoraWeights], architecture: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """kohya's form: three tensors for each BFL weight that holds a Linear of the adapter.

    <kohya name>.lora_down.weight [r in], .lora_up.weight [out r], and .alpha [] = r, in float32 since bfloat16 cannot
    hold every rank. Raises UserError for a Linear outside the blocks, which some client would drop.
    """
    outside = [module for module in modules if not is_target(architecture, module)]
    if outside:
        raise UserError(
            f"the adapter holds Linears that some clients drop and one refuses the file for: {listed(outside, 3)}",
            "export formats=[comfyui] or [diffusers], or train with adapter.targets=[attention,mlp]",
        )
    tensors = {}
    for weight, (down, up) in _by_weight(modules, architecture):
        name = kohya_of(weight)
        tensors[f"{name}.lora_down.weight"] = down.to(dtype)
        tensors[f"{name}.lora_up.weight"] = up.to(dtype)
        tensors[f"{name}.alpha"] = torch.tensor(float(down.shape[0]))
    return tensors


def comfyui(modules: Mapping[str, LoraWeights], architecture: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """BFL's names behind ComfyUI's prefix, lora_A [r in] and lora_B [out r] for each of BFL's weights."""
    tensors = {}
    for weight, (down, up) in _by_weight(modules, architecture):
        tensors[f"diffusion_model.{weight}.lora_A.weight"] = down.to(dtype)
        tensors[f"diffusion_model.{weight}.lora_B.weight"] = up.to(dtype)
    return tensors


def diffusers(modules: Mapping[str, LoraWeights], architecture: str, dtype: torch.dtype) -> dict[str, Tensor]:  # noqa: ARG001
    """Diffusers' own names, without alpha: its savers put that where other clients do not look."""
    tensors = {}
    for module, lora in modules.items():
        tensors[f"transformer.{module}.lora_A.weight"] = lora.down.to(dtype)
        tensors[f"transformer.{module}.lora_B.weight"] = _scaled(lora).to(dtype)
    return tensors


FORMATS: Mapping[str, Callable[[Mapping[str, LoraWeights], str, torch.dtype], dict[str, Tensor]]] = {
    "universal": universal,
    "comfyui": comfyui,
    "diffusers": diffusers,
}
"""Formats for clients; `peft` is written by flux2_lora.adapters."""


def state_of(lora: Lora) -> tuple[dict[str, Tensor], int, float]:
    """(PEFT's tensors, rank, alpha) of any LoRA, exact where all scales are equal.

    Where they are not, each is folded into its B, and alpha is the rank.
    """
    scales = {pair.scale for pair in lora.modules.values()}
    rank = max(len(pair.down) for pair in lora.modules.values())
    state = {}
    for module, pair in lora.modules.items():
        state[f"{module}.lora_A.weight"] = pair.down
        state[f"{module}.lora_B.weight"] = pair.up if len(scales) == 1 else _scaled(pair)
    return state, rank, rank * (scales.pop() if len(scales) == 1 else 1.0)


def _scaled(lora: LoraWeights) -> Tensor:
    return lora.scale * lora.up.float()


def _by_weight(modules: Mapping[str, LoraWeights], architecture: str) -> list[tuple[str, tuple[Tensor, Tensor]]]:
    """(BFL weight, its fused pair) for the weights that hold a Linear of the adapter."""
    weights = dict.fromkeys(bfl_of(architecture, module).module for module in modules)
    return [(weight, _fused(modules, architecture, members_of(architecture, weight))) for weight in weights]


def _fused(modules: Mapping[str, LoraWeights], architecture: str, members: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(down [sum of ranks, in], up [rows, sum of ranks]) of a weight's members; exact.

    Downs are stacked, scaled ups stand on a block diagonal; where all members share one down, as in files whose
    trainer adapts the fused weight, it stands once. A member without adapter keeps blocks of zeros, as wide as the
    first one: where all ranks are equal, Diffusers cuts the weight back into pairs of that rank.
    """
    places = {member: bfl_of(architecture, member) for member in members}
    shares = {member: place.stop - place.start for member, place in places.items()}
    trained = {member: modules[member] for member in members if member in modules}
    first, lora = next(iter(trained.items()))
    unit, wide, rank = lora.up.shape[0] // shares[first], lora.down.shape[1], lora.down.shape[0]
    if any(m.up.shape[0] != unit * shares[name] or m.down.shape[1] != wide for name, m in trained.items()):
        raise UserError(f"the adapter's tensors differ in shape between {listed(members)}", _REMEDY)
    ups = {
        member: _scaled(trained[member]) if member in trained else torch.zeros(unit * share, rank)
        for member, share in shares.items()
    }
    ups = {member: torch.cat(up.chunk(2)[::-1]) if places[member].swapped else up for member, up in ups.items()}
    downs = {
        member: trained[member].down.float() if member in trained else torch.zeros(rank, wide) for member in members
    }
    shared = len(trained) == len(members) > 1 and all(torch.equal(down, downs[first]) for down in downs.values())
    if shared:
        return downs[first], torch.cat(list(ups.values()))
    return torch.cat(list(downs.values())), torch.block_diag(*ups.values())


def _refuse(what: str, names: Sequence[str], remedy: str = _REMEDY) -> None:
    if names:
        raise UserError(f"the adapter holds {what} {listed(names, 3)}", remedy)


def _is_pair(lora: LoraWeights) -> bool:
    return lora.down.ndim == lora.up.ndim == 2 and lora.down.shape[0] == lora.up.shape[1] > 0
