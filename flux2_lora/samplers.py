"""Samplers as pure functions over a velocity: they know no model, no prompt and no file.

A `Velocity` maps (x [b c h w], sigma in [0, 1]) to dx/dsigma. A step from sigma to a smaller sigma' is
x + (sigma' - sigma) v. `on_step` may replace x after each step; inpainting is such a callback, and a `Filling` says
what else makes the rest heed what it puts back. `guided` makes one velocity of two.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flux2_lora.flow import generator, raise_noise, shift_sigmas
from flux2_lora.options import option

Velocity = Callable[[Tensor, float], Tensor]
OnStep = Callable[[Tensor, float], Tensor]
Sampler = Callable[[Velocity, Tensor, Tensor, OnStep | None], Tensor]

# sigma / (1 - sigma), by which theory bends a velocity, is cut to this: it knows no bound, and near pure noise the
# gradient of a network is mostly error.
_MOST_BENT = 4.0


@dataclass(frozen=True, kw_only=True)
class Filling:
    """How what is painted under a mask is made to fit what is kept, beyond putting that back after each step.

    resample: how often each step is taken, see `resampled`; reconstruction: whether velocities are bent, see
    `reconstructing`. Other programs know neither.
    """

    resample: int = option(1, at_least=1)
    reconstruction: bool = False

    @property
    def passes(self) -> int:
        """Forward passes a step, a backward pass with what it computes again counted as two."""
        return self.resample * (3 if self.reconstruction else 1)

    def sampler(self, of: Sampler, mask: Tensor, latents: Tensor, seed: int) -> Sampler:
        """`of`, which then fills the mask [1 1 h w], 1 = new, of latents [b or 1, c h w]. seed: of fresh noise."""
        bent = reconstructing(of, mask, latents) if self.reconstruction else of
        return resampled(bent, self.resample, seed)


USUAL = Filling()


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
    """The tail of a schedule that image-to-image runs: strength 1 all of it, 0 none; [k + 1].

    A part of a step counts as one, as Diffusers' pipelines count: 20 steps at strength 0.31 run 7.
    """
    steps = len(sigmas) - 1
    return sigmas[int(steps - min(steps * strength, steps)) :]


def from_level(steps: int, level: float) -> Tensor:
    """Noise levels that refine a picture: evenly from `level` to 0, in that part of `steps`; [k + 1].

    Not shifted: a schedule for whole pictures starts so high that what is there would be drawn anew.
    """
    return torch.linspace(level, 0.0, max(round(steps * level), 1) + 1)


def guided(positive: Velocity, negative: Velocity, cfg_scale: float) -> Velocity:
    """Classifier-free guidance, v = v_neg + s (v_pos - v_neg). Ho & Salimans 2022 (arXiv:2207.12598), eq. 6."""

    def velocity(x: Tensor, sigma: float) -> Tensor:
        away = negative(x, sigma)
        return away + cfg_scale * (positive(x, sigma) - away)

    return velocity


def euler(velocity: Velocity, x: Tensor, sigmas: Tensor, on_step: OnStep | None = None) -> Tensor:
    """First-order integration along `sigmas` [k + 1], falling; x: [b c h w] at sigmas[0]; returns x at sigmas[-1]."""
    for now, after in itertools.pairwise(sigmas.tolist()):
        x = _after(x + (after - now) * velocity(x, now), after, on_step)
    return x


def heun(velocity: Velocity, x: Tensor, sigmas: Tensor, on_step: OnStep | None = None) -> Tensor:
    """As `euler` with the mean of the velocities at both ends of a step: two evaluations, second order.

    The step to 0 is an Euler step. Karras et al. 2022 (arXiv:2206.00364), alg. 1.
    """
    for now, after in itertools.pairwise(sigmas.tolist()):
        slope = velocity(x, now)
        if after > 0:
            slope = (slope + velocity(x + (after - now) * slope, after)) / 2
        x = _after(x + (after - now) * slope, after, on_step)
    return x


def _after(x: Tensor, sigma: float, on_step: OnStep | None) -> Tensor:
    return x if on_step is None else on_step(x, sigma)


def resampled(sampler: Sampler, times: int, seed: int) -> Sampler:
    """The sampler with each step taken so many times: down, up with fresh noise, and down again.

    So what `on_step` puts back is heeded by the rest. Steps from pure noise and to none are taken once, since nothing
    would be left of what came before. Lugmayr et al. 2022 (arXiv:2201.09865), alg. 1, with jumps of one step. seed: of
    the fresh noise, which is the same for all of a batch.
    """

    def sample(velocity: Velocity, x: Tensor, sigmas: Tensor, on_step: OnStep | None = None) -> Tensor:
        fresh = generator(seed, "resample")
        for step in sigmas.unfold(0, 2, 1):
            now, after = step.tolist()
            x = sampler(velocity, x, step, on_step)
            for _ in range(times - 1 if now < 1 and after > 0 else 0):
                noise = torch.randn(x.shape[1:], generator=fresh).to(x)
                x = sampler(velocity, raise_noise(x, after, now, noise), step, on_step)
        return x

    return sample


def reconstructing(sampler: Sampler, mask: Tensor, latents: Tensor) -> Sampler:
    """The sampler with each velocity bent, so that the picture it leads to agrees with `latents` where mask is 0.

    That picture is x - sigma v(x); how far it is off where it should not be, taken back through the model by its
    gradient, says how all of x should move. Pseudo-inverse guidance, Song et al. 2023 (ICLR, "Pseudoinverse-guided
    diffusion models for inverse problems"), for flows as in Pokle et al. 2023 (arXiv:2310.04432), alg. 1. Each velocity
    takes a backward pass through the model. mask: [1 1 h w], 1 = new; latents: [b or 1, c h w].
    """

    def sample(velocity: Velocity, x: Tensor, sigmas: Tensor, on_step: OnStep | None = None) -> Tensor:
        def bent(x: Tensor, sigma: float) -> Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                straight = velocity(x, sigma)
                picture = x - sigma * straight
                off = ((1 - mask) * (latents - picture)).detach()
                (pull,) = torch.autograd.grad((off * picture).sum(), x)
            variance = sigma**2 / ((1 - sigma) ** 2 + sigma**2)
            factor = min(sigma / max(1 - sigma, 1e-9), _MOST_BENT)
            return straight.detach() - factor / variance * pull

        return sampler(bent, x, sigmas, on_step)

    return sample


SAMPLERS: Mapping[str, Sampler] = {"euler": euler, "heun": heun}
