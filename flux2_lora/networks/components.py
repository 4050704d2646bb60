"""What stands beside a transformer in a Diffusers folder: text encoders and autoencoder, checked and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from flux2_lora.errors import UserError
from flux2_lora.networks.text import PromptEncoder
from flux2_lora.sources import ModelFiles, check_parts
from flux2_lora.weights import Weights


class TextEncoders(Protocol):
    """The text side of a family."""

    @property
    def parts(self) -> Mapping[str, tuple[str, ...]]:
        """Folder -> classes it may hold; none for a tokenizer."""

    def width(self, components: Path) -> int:
        """Channels of the embeddings that these encoders give, from their configuration."""

    def load(self, components: Path, device: torch.device, length: int | None) -> PromptEncoder:
        """length: tokens that a text is padded or cut to; None for the family's own."""


def check_components(
    files: ModelFiles, parts: Mapping[str, tuple[str, ...]], family: str, text: TextEncoders, weights: Weights
) -> None:
    """UserError unless all parts are there and the text is as wide as the transformer reads it."""
    check_parts(files, parts, family)
    wide, wanted = text.width(files.components), weights.shapes.get("context_embedder.weight", (0, 0))[1]
    if wide != wanted:
        raise UserError(
            f"the text encoder of {files.option} gives {wide} channels, the transformer reads {wanted}",
            "transformer and text encoder are of different models; set model.path and model.components to one model",
        )


def load_autoencoder(kind: Any, files: ModelFiles, device: torch.device) -> nn.Module:
    """The frozen VAE in float32."""
    import diffusers

    # Loading is quick; the bar would stand between the lines of a run.
    diffusers.utils.logging.disable_progress_bar()
    vae: nn.Module = kind.from_pretrained(files.components, subfolder="vae", dtype=torch.float32, local_files_only=True)
    return vae.requires_grad_(False).eval().to(device)
