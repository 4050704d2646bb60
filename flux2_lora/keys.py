"""Names of weights: Diffusers modules against BFL (ComfyUI, single-file) modules, once for each architecture.

Law: this table stands nowhere else, and it is pure data. A BFL weight that fuses several Linears is described by the
rows each of them owns, so that a loader can cut it and an exporter can join it. Sources: the state dicts of
Flux2Transformer2DModel (Diffusers) and of BFL's flux2 repository, paired as in Diffusers' single-file converter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a Diffusers Linear lies: rows [start, stop) of `module`, counted in `parts` equal parts of its height.

    swapped: the BFL weight holds the two halves of its rows in the other order (shift, scale for scale, shift).
    """

    module: str
    start: int = 0
    stop: int = 1
    parts: int = 1
    swapped: bool = False


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Diffusers name -> place; `*` is the number of a block. LoRA targets are the Linears of `blocks` only.

    Outside the blocks the clients disagree (some drop these keys, some refuse the file, one forgets the swap).
    """

    blocks: Mapping[str, Place]
    outside: Mapping[str, Place]


def _third(module: str, part: int) -> Place:
    return Place(module=module, start=part, stop=part + 1, parts=3)


_FLUX2 = Architecture(
    blocks={
        "transformer_blocks.*.attn.to_q": _third("double_blocks.*.img_attn.qkv", 0),
        "transformer_blocks.*.attn.to_k": _third("double_blocks.*.img_attn.qkv", 1),
        "transformer_blocks.*.attn.to_v": _third("double_blocks.*.img_attn.qkv", 2),
        "transformer_blocks.*.attn.add_q_proj": _third("double_blocks.*.txt_attn.qkv", 0),
        "transformer_blocks.*.attn.add_k_proj": _third("double_blocks.*.txt_attn.qkv", 1),
        "transformer_blocks.*.attn.add_v_proj": _third("double_blocks.*.txt_attn.qkv", 2),
        "transformer_blocks.*.attn.to_out.0": Place(module="double_blocks.*.img_attn.proj"),
        "transformer_blocks.*.attn.to_add_out": Place(module="double_blocks.*.txt_attn.proj"),
        "transformer_blocks.*.ff.linear_in": Place(module="double_blocks.*.img_mlp.0"),
        "transformer_blocks.*.ff.linear_out": Place(module="double_blocks.*.img_mlp.2"),
        "transformer_blocks.*.ff_context.linear_in": Place(module="double_blocks.*.txt_mlp.0"),
        "transformer_blocks.*.ff_context.linear_out": Place(module="double_blocks.*.txt_mlp.2"),
        "single_transformer_blocks.*.attn.to_qkv_mlp_proj": Place(module="single_blocks.*.linear1"),
        "single_transformer_blocks.*.attn.to_out": Place(module="single_blocks.*.linear2"),
    },
    outside={
        "x_embedder": Place(module="img_in"),
        "context_embedder": Place(module="txt_in"),
        "time_guidance_embed.timestep_embedder.linear_1": Place(module="time_in.in_layer"),
        "time_guidance_embed.timestep_embedder.linear_2": Place(module="time_in.out_layer"),
        "time_guidance_embed.guidance_embedder.linear_1": Place(module="guidance_in.in_layer"),
        "time_guidance_embed.guidance_embedder.linear_2": Place(module="guidance_in.out_layer"),
        "double_stream_modulation_img.linear": Place(module="double_stream_modulation_img.lin"),
        "double_stream_modulation_txt.linear": Place(module="double_stream_modulation_txt.lin"),
        "single_stream_modulation.linear": Place(module="single_stream_modulation.lin"),
        "norm_out.linear": Place(module="final_layer.adaLN_modulation.1", swapped=True),
        "proj_out": Place(module="final_layer.linear"),
    },
)

ARCHITECTURES: Mapping[str, Architecture] = {"flux2": _FLUX2}


def bfl_of(architecture: str, module: str) -> Place:
    """The place of a Diffusers Linear in BFL's weights; KeyError for a name outside the table."""
    starred, number = _starred(module)
    table = ARCHITECTURES[architecture]
    place = table.blocks.get(starred) or table.outside[starred]
    return replace(place, module=place.module.replace("*", number))


def members_of(architecture: str, module: str) -> tuple[str, ...]:
    """The Diffusers Linears that a BFL module holds, in the order of their rows; KeyError for an unknown name."""
    starred, number = _starred(module)
    return tuple(member.replace("*", number) for member in _members(architecture)[starred])


def is_target(architecture: str, module: str) -> bool:
    """Whether a Diffusers module may carry a LoRA that every client can read."""
    return _starred(module)[0] in ARCHITECTURES[architecture].blocks


def kohya_of(module: str) -> str:
    """A BFL module under kohya's spelling: lora_unet_double_blocks_0_img_attn_qkv."""
    return "lora_unet_" + module.replace(".", "_")


@cache
def _members(architecture: str) -> Mapping[str, tuple[str, ...]]:
    table = ARCHITECTURES[architecture]
    fused: dict[str, list[tuple[int, str]]] = {}
    for member, place in (*table.blocks.items(), *table.outside.items()):
        fused.setdefault(place.module, []).append((place.start, member))
    return {module: tuple(member for _, member in sorted(rows)) for module, rows in fused.items()}


def _starred(module: str) -> tuple[str, str]:
    """("transformer_blocks.*.ff.linear_in", "7") of "transformer_blocks.7.ff.linear_in"; no number is ""."""
    found = re.match(r"(\w+_blocks)\.(\d+)\.", module)
    return (f"{found[1]}.*.{module[found.end() :]}", found[2]) if found else (module, "")
