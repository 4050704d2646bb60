"""What stands beside a transformer in a Diffusers folder: text encoders and autoencoder, matched to it and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from flux2_lora.errors import UserError
from flux2_lora.networks.text import PromptEncoder
from flux2_lora.sources import ModelFiles
from flux2_lora.weights import Weights


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


def load_autoencoder(kind: str, files: ModelFiles, device: torch.device) -> nn.Module:
    """The frozen VAE in float32."""
    import diffusers

    # Loading is quick; the bar would stand between the lines of a run.
    diffusers.utils.logging.disable_progress_bar()
    vae: nn.Module = getattr(diffusers, kind).from_pretrained(
        files.components, subfolder="vae", dtype=torch.float32, local_files_only=True
    )
    return vae.requires_grad_(False).eval().to(device)


def _columns(weights: Weights, name: str) -> int | None:
    """Columns of a matrix, None where there is none."""
    return weights.shapes[name][1] if name in weights.shapes else None
