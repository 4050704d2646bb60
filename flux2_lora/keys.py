"""Names of weights: Diffusers modules against BFL (ComfyUI, single-file) modules, once for each architecture.

Law: this table stands nowhere else, and it is pure data. A BFL weight that fuses several Linears is described by the
rows each of them owns, so that a loader can cut it and an exporter can join it. Sources: the state dicts of Diffusers'
FluxTransformer2DModel and Flux2Transformer2DModel and of BFL's flux and flux2 repositories, paired as in Diffusers'
single-file converter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a Diffusers module lies: rows [start, stop) of `module`, counted in `parts` equal parts of its height.

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

    outside: Linears that only a loader of the base needs (in a LoRA some clients drop these keys, some refuse the file,
    one forgets the swap). norms: RMS norms of queries and keys, whose one tensor BFL calls `scale`. fused: Linears of
    the blocks that compute for attention and MLP at once.
    """

    blocks: Mapping[str, Place]
    outside: Mapping[str, Place]
    norms: Mapping[str, Place]
    fused: frozenset[str]


def _third(module: str, part: int) -> Place:
    return Place(module=module, start=part, stop=part + 1, parts=3)


# What the double blocks and the norms of both architectures share.
_ATTENTION = {
    "transformer_blocks.*.attn.to_q": _third("double_blocks.*.img_attn.qkv", 0),
    "transformer_blocks.*.attn.to_k": _third("double_blocks.*.img_attn.qkv", 1),
    "transformer_blocks.*.attn.to_v": _third("double_blocks.*.img_attn.qkv", 2),
    "transformer_blocks.*.attn.add_q_proj": _third("double_blocks.*.txt_attn.qkv", 0),
    "transformer_blocks.*.attn.add_k_proj": _third("double_blocks.*.txt_attn.qkv", 1),
    "transformer_blocks.*.attn.add_v_proj": _third("double_blocks.*.txt_attn.qkv", 2),
    "transformer_blocks.*.attn.to_out.0": Place(module="double_blocks.*.img_attn.proj"),
    "transformer_blocks.*.attn.to_add_out": Place(module="double_blocks.*.txt_attn.proj"),
}
_NORMS = {
    "transformer_blocks.*.attn.norm_q": Place(module="double_blocks.*.img_attn.norm.query_norm"),
    "transformer_blocks.*.attn.norm_k": Place(module="double_blocks.*.img_attn.norm.key_norm"),
    "transformer_blocks.*.attn.norm_added_q": Place(module="double_blocks.*.txt_attn.norm.query_norm"),
    "transformer_blocks.*.attn.norm_added_k": Place(module="double_blocks.*.txt_attn.norm.key_norm"),
    "single_transformer_blocks.*.attn.norm_q": Place(module="single_blocks.*.norm.query_norm"),
    "single_transformer_blocks.*.attn.norm_k": Place(module="single_blocks.*.norm.key_norm"),
}

_FLUX1 = Architecture(
    blocks={
        **_ATTENTION,
        "transformer_blocks.*.ff.net.0.proj": Place(module="double_blocks.*.img_mlp.0"),
        "transformer_blocks.*.ff.net.2": Place(module="double_blocks.*.img_mlp.2"),
        "transformer_blocks.*.ff_context.net.0.proj": Place(module="double_blocks.*.txt_mlp.0"),
        "transformer_blocks.*.ff_context.net.2": Place(module="double_blocks.*.txt_mlp.2"),
        "single_transformer_blocks.*.attn.to_q": Place(module="single_blocks.*.linear1", start=0, stop=1, parts=7),
        "single_transformer_blocks.*.attn.to_k": Place(module="single_blocks.*.linear1", start=1, stop=2, parts=7),
        "single_transformer_blocks.*.attn.to_v": Place(module="single_blocks.*.linear1", start=2, stop=3, parts=7),
        "single_transformer_blocks.*.proj_mlp": Place(module="single_blocks.*.linear1", start=3, stop=7, parts=7),
        "single_transformer_blocks.*.proj_out": Place(module="single_blocks.*.linear2"),
    },
    outside={
        "x_embedder": Place(module="img_in"),
        "context_embedder": Place(module="txt_in"),
        "time_text_embed.timestep_embedder.linear_1": Place(module="time_in.in_layer"),
        "time_text_embed.timestep_embedder.linear_2": Place(module="time_in.out_layer"),
        "time_text_embed.guidance_embedder.linear_1": Place(module="guidance_in.in_layer"),
        "time_text_embed.guidance_embedder.linear_2": Place(module="guidance_in.out_layer"),
        "time_text_embed.text_embedder.linear_1": Place(module="vector_in.in_layer"),
        "time_text_embed.text_embedder.linear_2": Place(module="vector_in.out_layer"),
        "transformer_blocks.*.norm1.linear": Place(module="double_blocks.*.img_mod.lin"),
        "transformer_blocks.*.norm1_context.linear": Place(module="double_blocks.*.txt_mod.lin"),
        "single_transformer_blocks.*.norm.linear": Place(module="single_blocks.*.modulation.lin"),
        "norm_out.linear": Place(module="final_layer.adaLN_modulation.1", swapped=True),
        "proj_out": Place(module="final_layer.linear"),
    },
    norms=_NORMS,
    fused=frozenset({"single_transformer_blocks.*.proj_out"}),
)

_FLUX2 = Architecture(
    blocks={
        **_ATTENTION,
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
    norms=_NORMS,
    fused=frozenset({"single_transformer_blocks.*.attn.to_qkv_mlp_proj", "single_transformer_blocks.*.attn.to_out"}),
)

ARCHITECTURES: Mapping[str, Architecture] = {"flux1": _FLUX1, "flux2": _FLUX2}


def bfl_of(architecture: str, module: str) -> Place:
    """The place of a Diffusers module in BFL's weights; KeyError for a name outside the table."""
    starred, number = _starred(module)
    table = ARCHITECTURES[architecture]
    place = table.blocks.get(starred) or table.outside.get(starred) or table.norms[starred]
    return replace(place, module=place.module.replace("*", number))


def rows_of(place: Place, height: int) -> slice:
    """The rows of a BFL weight of that height which belong to the module at `place`."""
    return slice(height * place.start // place.parts, height * place.stop // place.parts)


def members_of(architecture: str, module: str) -> tuple[str, ...]:
    """The Diffusers modules that a BFL module holds, in the order of their rows; KeyError for an unknown name."""
    starred, number = _starred(module)
    return tuple(member.replace("*", number) for member in _members(architecture)[starred])


def is_target(architecture: str, module: str) -> bool:
    """Whether a Diffusers module may carry a LoRA that every client can read."""
    return _starred(module)[0] in ARCHITECTURES[architecture].blocks


def kinds_of(architecture: str, module: str) -> tuple[str, ...]:
    """What a Linear of the blocks computes for: attention, mlp, or both where they are fused."""
    starred = _starred(module)[0]
    if starred in ARCHITECTURES[architecture].fused:
        return ("attention", "mlp")
    return ("attention",) if ".attn." in starred else ("mlp",)


def kohya_of(module: str) -> str:
    """A BFL module under kohya's spelling: lora_unet_double_blocks_0_img_attn_qkv."""
    return "lora_unet_" + module.replace(".", "_")


@cache
def _members(architecture: str) -> Mapping[str, tuple[str, ...]]:
    table = ARCHITECTURES[architecture]
    fused: dict[str, list[tuple[int, str]]] = {}
    for member, place in (*table.blocks.items(), *table.outside.items(), *table.norms.items()):
        fused.setdefault(place.module, []).append((place.start, member))
    return {module: tuple(member for _, member in sorted(rows)) for module, rows in fused.items()}


def _starred(module: str) -> tuple[str, str]:
    """("transformer_blocks.*.ff.linear_in", "7") of "transformer_blocks.7.ff.linear_in"; no number is ""."""
    found = re.match(r"(\w+_blocks)\.(\d+)\.", module)
    return (f"{found[1]}.*.{module[found.end() :]}", found[2]) if found else (module, "")
