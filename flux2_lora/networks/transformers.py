"""Transformers before their weights: which one a file holds, its configuration, its shape without memory.

Law: a file is recognised by its tensors. A single file carries no configuration, so everything that its transformer is
built from (width, blocks, text width, guidance) is read off the shapes; what is left is the same for all its kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flux2_lora.errors import UserError
from flux2_lora.networks.components import on_meta, shapes_of
from flux2_lora.sources import ModelFiles, check_class
from flux2_lora.weights import Weights, open_file, open_folder, read_json

Shapes = Mapping[str, tuple[int, ...]]
_REMEDY = "model.path takes the transformer: a Diffusers folder, a hub id, or a file of the diffusion model"


def open_transformer(files: ModelFiles, kind: str, architecture: str, family: str) -> Weights:
    """The transformer's tensors by Diffusers' names; UserError for anything but a whole one of this class."""
    if files.transformer.is_file():
        weights = open_file(files.transformer, architecture)
        _refuse_other_files(files, weights.shapes, architecture)
        return weights
    check_class(files.transformer, [kind], family)
    return open_folder(files.transformer)


def empty_transformer(
    files: ModelFiles, kind: str, weights: Weights, read_off: Callable[[Shapes], dict[str, Any]]
) -> nn.Module:
    """The transformer on the meta device, in evaluation mode; UserError unless `weights` has exactly its tensors."""
    if files.transformer.is_file():
        config = read_off(weights.shapes)
        _refuse_lost_blocks(files, config)
    else:
        config = read_json(files.transformer / "config.json")
    transformer = on_meta(kind, config, str(files.transformer))
    weights.expect(shapes_of(transformer))
    return transformer


def blocks_in(transformer: nn.Module) -> dict[str, nn.Module]:
    """Path -> block, the members of the model's ModuleLists, in the order in which they run."""
    stacks = {name: child for name, child in transformer.named_children() if isinstance(child, nn.ModuleList)}
    return {f"{name}.{place}": block for name, stack in stacks.items() for place, block in enumerate(stack)}


def block_linears(transformer: nn.Module) -> list[str]:
    """Paths of the Linears inside the blocks; adapted or not."""
    return [
        f"{name}.{path}".removesuffix(".base_layer")
        for name, block in blocks_in(transformer).items()
        for path, module in block.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in path
    ]


def compute_type(transformer: nn.Module) -> torch.dtype:
    """The type that the transformer's first layer computes in: that of its inputs."""
    dtype = transformer.get_submodule("x_embedder").weight.dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


def compute_device(transformer: nn.Module) -> torch.device:
    """Where the transformer computes, wherever the weights of its blocks lie."""
    device = transformer.get_submodule("x_embedder").weight.device
    assert isinstance(device, torch.device)
    return device


def embedded_guidance(transformer: nn.Module, latents: Tensor, guidance: float | None) -> Tensor | None:
    """[b] for a model with a guidance embedding, 1 where nothing is asked for; None for a model without."""
    config: Any = transformer.config
    if not config.guidance_embeds:
        return None
    return torch.full((len(latents),), 1.0 if guidance is None else guidance, device=latents.device)


def shape_of(shapes: Shapes, name: str) -> tuple[int, ...]:
    """A tensor's shape; UserError that names it when it is missing."""
    if name not in shapes:
        raise UserError(f"the transformer's file lacks {name}", "the file is incomplete; fetch it again")
    return shapes[name]


def blocks_of(shapes: Shapes, kind: str) -> int:
    """How many blocks stand under `kind`: transformer_blocks or single_transformer_blocks."""
    return len({name.split(".")[1] for name in shapes if name.startswith(f"{kind}.")})


def stacks_of(shapes: Shapes) -> dict[str, Any]:
    """What the configurations of all architectures share: both stacks of blocks, their width, and what they read."""
    width, channels = shape_of(shapes, "x_embedder.weight")
    head = shape_of(shapes, "transformer_blocks.0.attn.norm_q.weight")[0]
    return {
        "in_channels": channels,
        "num_layers": blocks_of(shapes, "transformer_blocks"),
        "num_single_layers": blocks_of(shapes, "single_transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shape_of(shapes, "context_embedder.weight")[1],
    }


def _refuse_lost_blocks(files: ModelFiles, config: Mapping[str, Any]) -> None:
    """UserError for a file with fewer or more blocks than the model beside it says, where it says so."""
    beside = files.components / "transformer" / "config.json"
    said = read_json(beside) if beside.is_file() else {}
    for key, kind in (("num_layers", "double"), ("num_single_layers", "single")):
        if said.get(key, config[key]) != config[key]:
            raise UserError(
                f"{files.transformer} holds {config[key]} {kind} blocks, its model has {said[key]} ({files.option})",
                "the file is incomplete, or model.components is another model's",
            )


def _refuse_other_files(files: ModelFiles, shapes: Shapes, architecture: str) -> None:
    """UserError that says what the file is, where it is no transformer of `architecture`."""
    found = _kind_of(shapes)
    if found != architecture:
        named = {"flux1": "a FLUX.1 transformer", "flux2": "a FLUX.2 transformer"}
        remedy = "choose a model of its family with model=..." if found in named else _REMEDY
        raise UserError(
            f"model.path={files.transformer} is {named.get(found, found)}, not {named[architecture]}", remedy
        )


def _kind_of(shapes: Shapes) -> str:
    """The architecture whose names the tensors have, or what else they look like, in words."""

    def any_of(*parts: str) -> bool:
        return any(part in f".{name}" for name in shapes for part in parts)

    if any_of(".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".lokr_", ".hada_"):
        return "a LoRA"
    if any_of(".single_transformer_blocks.", ".transformer_blocks."):
        if any_of(".single_stream_modulation."):
            return "flux2"
        if any_of(".time_text_embed."):
            return "flux1"
        return "a transformer of another architecture"
    if any_of(".decoder.mid", ".decoder.up"):
        return "a VAE"
    if any_of(".layers.", ".encoder.block.", ".text_model."):
        return "a text encoder"
    return "no transformer"
