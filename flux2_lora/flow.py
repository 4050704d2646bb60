"""Rectified flow: the straight path between a picture and noise, and how often each point of it is trained.

    x(sigma) = (1 - sigma) z + sigma eps,    velocity = dx / dsigma = eps - z

Liu et al. 2022 (arXiv:2209.03003); densities and shift after Esser et al. 2024 (arXiv:2403.03206).
Randomness is a function of (seed, step, sample): `generator` makes a stream from such a key, nothing is carried along.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

# FLUX.1 trained with mu linear in the number of packed tokens; FLUX.2's authors confirm it for fine-tuning.
_TOKENS, _MU = (256, 4096), (0.5, 1.15)


@dataclass(frozen=True, kw_only=True)
class TimestepSpec:
    """Density of noise levels in training: sigma = sigmoid(N(mean, std)), then moved by the model's shift."""

    mean: float = 0.0
    std: float = 1.0
    shift: bool = True


def generator(*key: int | str) -> torch.Generator:
    """A CPU random stream that is a function of its key alone: same key, same numbers, in any process."""
    hashed = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(hashed[:8], "little") >> 1)


def linear_mu(tokens: int) -> float:
    """Shift exponent for training: 0.5 at 256 packed tokens, 1.15 at 4096, linear between and beyond."""
    return _MU[0] + (tokens - _TOKENS[0]) * (_MU[1] - _MU[0]) / (_TOKENS[1] - _TOKENS[0])


def shift_sigmas(sigmas: Tensor, mu: float) -> Tensor:
    """Move noise levels towards 1 for larger images.

    sigmas: [n] in [0, 1]; returns [n] in [0, 1], order kept, 0 and 1 fixed.
    Esser et al. 2024 (arXiv:2403.03206), eq. 23, with e^mu = sqrt(m / n).
    """
    stretch = math.exp(mu)
    return stretch * sigmas / (1 + (stretch - 1) * sigmas)


def draw_sigma(spec: TimestepSpec, mu: float, stream: torch.Generator) -> float:
    """One noise level in (0, 1) from the density of `spec`, shifted by mu where the spec says so."""
    sigma = torch.sigmoid(spec.mean + spec.std * torch.randn(1, generator=stream))
    return float(shift_sigmas(sigma, mu) if spec.shift else sigma)


def mix(latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """x at noise level sigma. latents, noise: [b c h w]; sigmas: [b]."""
    level = sigmas.view(-1, 1, 1, 1)
    return (1 - level) * latents + level * noise


def velocity_error(predicted: Tensor, latents: Tensor, noise: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error to noise - latents for every sample, in float32. [b c h w] x 3 -> [b].

    mask: [b 1 h w], what each place counts; its own scale does not matter, and a mask of zeros gives 0.
    """
    error = (predicted.float() - (noise - latents).float()).square()
    if mask is None:
        return error.mean(dim=(1, 2, 3))
    total = mask.sum(dim=(1, 2, 3)).clamp_min(1e-6)
    return (error.mean(dim=1, keepdim=True) * mask).sum(dim=(1, 2, 3)) / total
