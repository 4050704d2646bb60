"""Geometry of FLUX.2 latents: 2x2 patches become channels, channels are normalised, pixels become tokens.

    VAE latents [b 32 h/8 w/8]  <->  latents [b 128 h/16 w/16]  <->  packed [b n 128], n = h/16 * w/16

Noise is drawn, cached, mixed and edited in the middle form; only the transformer sees tokens. The patch order
(channel, row, column) and the batch-norm statistics are those of diffusers' Flux2KleinPipeline.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Posterior:
    """What a VAE says of a picture: a normal distribution of normalised latents. mean, std: [b c h w]."""

    mean: Tensor
    std: Tensor

    def draw(self, stream: torch.Generator) -> Tensor:
        """One of the latents that the picture may have, [b c h w]; `stream` is on the CPU."""
        return self.mean + self.std * torch.randn(self.mean.shape, generator=stream).to(self.mean)


def patchify(vae_latents: Tensor) -> Tensor:
    """[b c h w] -> [b 4c h/2 w/2]."""
    return F.pixel_unshuffle(vae_latents, 2)


def unpatchify(latents: Tensor) -> Tensor:
    """[b 4c h w] -> [b c 2h 2w]."""
    return F.pixel_shuffle(latents, 2)


def normalise(latents: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """Zero mean and unit variance a channel; mean, var: [c] running statistics of the VAE's batch norm."""
    return (latents - _per_channel(mean, latents)) / _std(var, eps, latents)


def denormalise(latents: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """The inverse of `normalise`."""
    return latents * _std(var, eps, latents) + _per_channel(mean, latents)


def pack(latents: Tensor) -> Tensor:
    """[b c h w] -> tokens [b h*w c], row by row."""
    return latents.flatten(2).transpose(1, 2)


def unpack(packed: Tensor, height: int, width: int) -> Tensor:
    """Tokens [b h*w c] -> [b c h w]; height and width in tokens."""
    return packed.transpose(1, 2).reshape(len(packed), -1, height, width)


def image_ids(height: int, width: int, device: torch.device | str = "cpu", *, t: int = 0) -> Tensor:
    """Positions (t, row, column, l) of image tokens, [h*w 4]; l = 0, and t = 0 but for pictures that are shown."""
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    return torch.cartesian_prod(torch.full_like(rows[:1], t), rows, columns, torch.zeros_like(rows[:1]))


def text_ids(tokens: int, device: torch.device | str = "cpu") -> Tensor:
    """Positions (0, 0, 0, l) of text tokens, [tokens 4]."""
    ids = torch.zeros(tokens, 4, dtype=torch.long, device=device)
    ids[:, 3] = torch.arange(tokens, device=device)
    return ids


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1).to(like)


def _std(var: Tensor, eps: float, like: Tensor) -> Tensor:
    return torch.sqrt(var.view(1, -1, 1, 1) + eps).to(like)
