"""What stands beside a transformer in a Diffusers folder: text encoders and autoencoder, matched to it and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from torch import nn

from flux2_lora.errors import UserError
from flux2_lora.networks.text import PromptEncoder
from flux2_lora.sources import ModelFiles
from flux2_lora.weights import Weights, open_folder, read_json


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Channels of a text's embeddings and of its pooled state (0: there is none)."""

    embeds: int
    pooled: int = 0


class TextEncoders(Protocol):
    """The text side of a family."""

    @property
    def parts(self) -> Mapping[str, tuple[str, ...]]:
        """Folder -> classes it may hold; none for a tokenizer."""

    def widths(self, components: Path) -> Widths:
        """What these encoders give, from their configuration."""

    def check(self, components: Path) -> None:
        """UserError unless all tensors and tokenizers are there; reads headers only."""

    def load(self, components: Path, device: torch.device, length: int | None) -> PromptEncoder:
        """length: tokens that a text is padded or cut to; None for the family's own."""


def check_widths(files: ModelFiles, weights: Weights, latent_channels: int, text: TextEncoders) -> None:
    """UserError unless the transformer reads the family's latents, and text as wide as its encoders give.

    A layer that is missing altogether is left to `Weights.expect`.
    """
    channels = _columns(weights, "x_embedder.weight")
    if channels not in (None, latent_channels):
        raise UserError(
            f"{files.transformer} takes {channels} channels where the family's latents have {latent_channels}: "
            "a Fill or Control model, which reads a picture too",
            "give a model that draws from text alone",
        )
    widths = text.widths(files.components)
    for what, given, wanted in (
        ("embeddings", widths.embeds, _columns(weights, "context_embedder.weight")),
        ("a pooled state", widths.pooled, _columns(weights, "time_text_embed.text_embedder.linear_1.weight")),
    ):
        if wanted not in (None, given):
            raise UserError(
                f"the text encoder of {files.option} gives {what} of {given} channels, the transformer reads {wanted}",
                "transformer and text encoder are of different models; set model.path and model.components to one",
            )


def on_meta(kind: str, config: Mapping[str, Any], source: str) -> nn.Module:
    """A model of Diffusers without memory, in evaluation mode; UserError where the configuration builds none."""
    import diffusers

    try:
        with init_empty_weights():
            model: nn.Module = getattr(diffusers, kind).from_config(dict(config))
    except (TypeError, ValueError) as error:
        what = f"{source}/config.json builds no {kind} ({str(error).splitlines()[0]})"
        raise UserError(what, "fetch the file again") from error
    return model.eval()


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of everything that a model stores."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def empty_autoencoder(kind: str, files: ModelFiles, latent_channels: int) -> nn.Module:
    """The VAE on the meta device; UserError unless its files hold exactly its tensors, and latents of this width."""
    folder = files.components / "vae"
    config = read_json(folder / "config.json")
    vae = on_meta(kind, config, str(folder))
    open_folder(folder).expect(shapes_of(vae))
    channels, wanted = config.get("latent_channels"), latent_channels // 4
    if channels != wanted:
        raise UserError(
            f"{folder} has {channels} latent channels, the transformer reads {wanted}",
            "transformer and VAE are of different models; set model.path and model.components to one model",
        )
    return vae


def load_autoencoder(kind: str, files: ModelFiles, latent_channels: int, device: torch.device) -> nn.Module:
    """The frozen VAE in float32."""
    vae, weights = empty_autoencoder(kind, files, latent_channels), open_folder(files.components / "vae")
    counters = {name for name, tensor in vae.state_dict().items() if not tensor.is_floating_point()}
    tensors = {
        name: weights.read(name).dense(torch.int64 if name in counters else torch.float32, device)
        for name in weights.shapes
    }
    vae.load_state_dict(tensors, assign=True)
    return vae.requires_grad_(False).to(device)


def check_own_weights(folder: Path, config: Mapping[str, Any], *, such_as: str) -> None:
    """UserError unless a model's folder holds its weights as safetensors, as they were released; reads headers only."""
    if config.get("quantization_config") or (folder / "adapter_config.json").is_file():
        raise UserError("its weights are quantised or an adapter's", "give the folder of the original model")
    if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        raise UserError(
            "its weights are pickled, which can run any code when opened, and there are no safetensors",
            f"use a repository that has model.safetensors, such as {such_as}",
        )
    open_folder(folder)


def _columns(weights: Weights, name: str) -> int | None:
    """Columns of a matrix, None where there is none."""
    return weights.shapes[name][1] if name in weights.shapes else None
