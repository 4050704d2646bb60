"""Diffusers' tensors under BFL's names, as released single files have them: written by hand, and not by our table."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

RENAMED = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    **{f"double_stream_modulation_{s}.linear": f"double_stream_modulation_{s}.lin" for s in ("img", "txt")},
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    **{
        f"{embed}.{theirs}_embedder.linear_{n}": f"{ours}_in.{layer}_layer"
        for embed in ("time_text_embed", "time_guidance_embed")
        for theirs, ours in (("timestep", "time"), ("guidance", "guidance"), ("text", "vector"))
        for n, layer in ((1, "in"), (2, "out"))
    },
}
IN_BLOCKS = {
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "norm.linear": "modulation.lin",
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
    "proj_out": "linear2",
}


MEMBERS = {
    "double_blocks": {
        "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
        "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    },
    "single_blocks": {"linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]},
}


def fused(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """BFL's form of Diffusers' tensors."""
    made: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for key, tensor in tensors.items():
        path, _, leaf = key.rpartition(".")
        if "blocks." not in path:
            halves = tensor.chunk(2)[::-1] if path == "norm_out.linear" else (tensor,)
            made[f"{RENAMED[path]}.{leaf}"] = torch.cat(halves)
            continue
        stack, number, inside = path.split(".", 2)
        stack = {"transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks"}[stack]
        found = [(place, names.index(inside)) for place, names in MEMBERS[stack].items() if inside in names]
        if ".norm_" in path:
            side = "" if stack == "single_blocks" else "txt_attn." if "added" in path else "img_attn."
            which = "query" if path.endswith("_q") else "key"
            made[f"{stack}.{number}.{side}norm.{which}_norm.scale"] = tensor
        elif found:
            parts.setdefault(f"{stack}.{number}.{found[0][0]}.{leaf}", {})[found[0][1]] = tensor
        else:
            made[f"{stack}.{number}.{IN_BLOCKS[inside]}.{leaf}"] = tensor
    return made | {key: torch.cat([members[i] for i in sorted(members)]) for key, members in parts.items()}
