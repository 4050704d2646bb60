"""The spellings of LoRA files: for every weight of FLUX.1 and FLUX.2 its names, and files made of random pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from flux2_lora.families import Model, ModelSpec, load_family
from flux2_lora.networks.components import shapes_of
from flux2_lora.sources import ModelFiles
from flux2_lora.weights import Weights

RANK, ALPHA = 4, 3.0
ATTENTION = {
    "double_blocks.*.img_attn.qkv": [f"transformer_blocks.*.attn.to_{part}" for part in "qkv"],
    "double_blocks.*.txt_attn.qkv": [f"transformer_blocks.*.attn.add_{part}_proj" for part in "qkv"],
    "double_blocks.*.img_attn.proj": ["transformer_blocks.*.attn.to_out.0"],
    "double_blocks.*.txt_attn.proj": ["transformer_blocks.*.attn.to_add_out"],
}
FUSED: Mapping[str, Mapping[str, list[str]]] = {
    "flux1": {
        **ATTENTION,
        "double_blocks.*.img_mlp.0": ["transformer_blocks.*.ff.net.0.proj"],
        "double_blocks.*.img_mlp.2": ["transformer_blocks.*.ff.net.2"],
        "double_blocks.*.txt_mlp.0": ["transformer_blocks.*.ff_context.net.0.proj"],
        "double_blocks.*.txt_mlp.2": ["transformer_blocks.*.ff_context.net.2"],
        "double_blocks.*.img_mod.lin": ["transformer_blocks.*.norm1.linear"],
        "single_blocks.*.linear1": [
            *(f"single_transformer_blocks.*.attn.to_{part}" for part in "qkv"),
            "single_transformer_blocks.*.proj_mlp",
        ],
        "single_blocks.*.linear2": ["single_transformer_blocks.*.proj_out"],
    },
    "flux2": {
        **ATTENTION,
        "double_blocks.*.img_mlp.0": ["transformer_blocks.*.ff.linear_in"],
        "double_blocks.*.img_mlp.2": ["transformer_blocks.*.ff.linear_out"],
        "double_blocks.*.txt_mlp.0": ["transformer_blocks.*.ff_context.linear_in"],
        "double_blocks.*.txt_mlp.2": ["transformer_blocks.*.ff_context.linear_out"],
        "single_blocks.*.linear1": ["single_transformer_blocks.*.attn.to_qkv_mlp_proj"],
        "single_blocks.*.linear2": ["single_transformer_blocks.*.attn.to_out"],
        "single_stream_modulation.lin": ["single_stream_modulation.linear"],
    },
}


def opened(transformer: nn.Module, family: str) -> Model:
    """A model as it is known before it is loaded: by the shapes of its tensors."""
    spec = ModelSpec(family=family, path="", title=family, architecture_name=family)
    files = ModelFiles(transformer=Path(), components=Path(), option="model.path")
    return Model(spec, load_family(family), files, Weights(Path(), {}, shapes_of(transformer)))


@cache
def flux1_model() -> Model:
    """FLUX.1 of 1 double and 2 single blocks."""
    from diffusers import FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )
    return opened(transformer, "flux1")


def fused(model: Model) -> Iterator[tuple[str, list[str]]]:
    """(BFL weight, its Linears) of all blocks of a model, by the table above."""
    for weight, members in FUSED[model.family.architecture].items():
        for block in "01" if "*" in weight else "0":
            linears = [member.replace("*", block) for member in members]
            if f"{linears[0]}.weight" in model.weights.shapes:
                yield weight.replace("*", block), linears


def shape(model: Model, module: str) -> tuple[int, ...]:
    return model.weights.shapes[f"{module}.weight"]


def draw(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """A [4 columns] and B [rows 4]."""
    rng = torch.Generator().manual_seed(seed)
    return 0.2 * torch.randn(RANK, columns, generator=rng), 0.2 * torch.randn(rows, RANK, generator=rng)


def by_linear(model: Model) -> dict[str, tuple[Tensor, Tensor]]:
    """Diffusers module -> A, B."""
    modules = [member for _, members in fused(model) for member in members]
    return {module: draw(*shape(model, module), seed) for seed, module in enumerate(modules)}


def by_weight(model: Model) -> dict[str, tuple[Tensor, Tensor]]:
    """BFL weight -> A, B over the rows of all its Linears."""
    heights = {weight: sum(shape(model, m)[0] for m in members) for weight, members in fused(model)}
    widths = {weight: shape(model, members[0])[1] for weight, members in fused(model)}
    return {weight: draw(heights[weight], widths[weight], seed) for seed, weight in enumerate(heights)}


def expected(model: Model, pairs: Mapping[str, tuple[Tensor, Tensor]], scale: float) -> dict[str, Tensor]:
    """Diffusers module -> the update that pairs under either naming mean."""
    updates = {}
    for weight, members in fused(model):
        if weight in pairs:
            down, up = pairs[weight]
            rows = (scale * up @ down).split([shape(model, member)[0] for member in members])
            updates |= dict(zip(members, rows, strict=True))
    return updates or {module: scale * up @ down for module, (down, up) in pairs.items()}


def written(
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    spelled: Callable[[str], str],
    halves: tuple[str, str],
    alpha: float | None = None,
) -> dict[str, Tensor]:
    """The tensors of a file."""
    tensors = {}
    for module, (down, up) in pairs.items():
        tensors[f"{spelled(module)}.{halves[0]}"] = down.clone()
        tensors[f"{spelled(module)}.{halves[1]}"] = up.clone()
        if alpha is not None:
            tensors[f"{spelled(module)}.alpha"] = torch.tensor(alpha)
    return tensors


AB, DOWN_UP = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
BY_WEIGHT = [
    ("kohya", lambda name: "lora_unet_" + name.replace(".", "_"), DOWN_UP, ALPHA),
    ("BFL", lambda name: f"diffusion_model.{name}", AB, None),
    ("BFL", lambda name: f"diffusion_model.{name}", DOWN_UP, ALPHA),
]
BY_LINEAR = [
    ("kohya", lambda name: "lora_transformer_" + name.replace(".", "_"), DOWN_UP, ALPHA),
    ("kohya", lambda name: "lora_unet_" + name.replace(".", "_"), DOWN_UP, ALPHA),
    ("Diffusers", lambda name: f"transformer.{name}", AB, None),
    ("Diffusers", lambda name: f"transformer.{name}", AB, ALPHA),
    ("Diffusers", lambda name: name, AB, None),
    ("Diffusers", lambda name: f"base_model.model.{name}", AB, ALPHA),
    ("Diffusers", lambda name: f"transformer.{name}", ("lora.down.weight", "lora.up.weight"), ALPHA),
]
