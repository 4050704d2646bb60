"""Samplers as pure functions over a velocity: they know no model, no prompt and no file.

A `Velocity` maps (x [b c h w], sigma in [0, 1]) to dx/dsigma. A step from sigma to a smaller sigma' is
x + (sigma' - sigma) v. `on_step` may replace x after each step; inpainting is such a callback.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flux2_lora.flow import shift_sigmas

Velocity = Callable[[Tensor, float], Tensor]
OnStep = Callable[[Tensor, float], Tensor]


def empirical_mu(tokens: int, steps: int) -> float:
    """FLUX.2's shift exponent for inference: linear in packed tokens, fitted at 10 and 200 steps.

    Source: compute_empirical_mu of the FLUX.2 reference code, as in diffusers.
    """
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    slope = (at_200 - at_10) / 190
    return slope * steps + at_200 - 200 * slope


def schedule(steps: int, mu: float) -> Tensor:
    """Noise levels of a run, [steps + 1] float32, from 1 down to 0: evenly spaced, then shifted by mu."""
    sigmas = torch.linspace(1.0, 1.0 / steps, steps)
    return torch.cat([shift_sigmas(sigmas, mu), torch.zeros(1)])


def from_strength(sigmas: Tensor, strength: float) -> Tensor:
    """The tail of a schedule that image-to-image runs: strength 1 all of it, 0 none; [k + 1]."""
    steps = len(sigmas) - 1
    return sigmas[steps - min(round(steps * strength), steps) :]


def guided(positive: Velocity, negative: Velocity, cfg_scale: float) -> Velocity:
    """Classifier-free guidance, v = v_neg + s (v_pos - v_neg). Ho & Salimans 2022 (arXiv:2207.12598), eq. 6."""

    def velocity(x: Tensor, sigma: float) -> Tensor:
        away = negative(x, sigma)
        return away + cfg_scale * (positive(x, sigma) - away)

    return velocity


def euler(velocity: Velocity, x: Tensor, sigmas: Tensor, on_step: OnStep | None = None) -> Tensor:
    """First-order integration along `sigmas` [k + 1], falling; x: [b c h w] at sigmas[0]; returns x at sigmas[-1]."""
    for now, after in zip(sigmas.tolist()[:-1], sigmas.tolist()[1:], strict=True):
        x = x + (after - now) * velocity(x, now)
        if on_step is not None:
            x = on_step(x, after)
    return x
