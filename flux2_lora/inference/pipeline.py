"""Text-to-image and image-to-image over a family's velocity: the same few lines for previews and for programs.

Seeds mean what they mean in Diffusers: the noise of a picture is one CPU draw of its seed in latent shape, so a seed,
a size, a number of steps and a cfg_scale give the picture that the Diffusers pipeline of the family gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flux2_lora.conditioning import Conditioning
from flux2_lora.families import ModelFamily
from flux2_lora.flow import mix
from flux2_lora.samplers import OnStep, Velocity, euler, from_strength, guided, schedule


@dataclass(frozen=True, kw_only=True)
class Prompted:
    """What steers a batch of pictures. positive: of b; negative: of 1 or b, used where cfg_scale > 1."""

    positive: Conditioning
    negative: Conditioning
    cfg_scale: float
    guidance: float | None


def initial_noise(family: ModelFamily, height_px: int, width_px: int, seeds: Sequence[int]) -> Tensor:
    """Standard normal latents [b c h w], one seed a picture; pixels rounded down to whole tokens."""
    side = family.pixels_per_token
    height, width = height_px // side, width_px // side
    return torch.cat([family.draw_noise(height, width, torch.Generator().manual_seed(seed)) for seed in seeds])


def velocity_of(family: ModelFamily, transformer: nn.Module, prompted: Prompted) -> Velocity:
    """The transformer as a `Velocity` under its prompts, with true CFG where cfg_scale > 1."""

    def under(conditioning: Conditioning) -> Velocity:
        def velocity(x: Tensor, sigma: float) -> Tensor:
            levels = torch.full((len(x),), sigma, device=x.device)
            fitting = conditioning if len(conditioning) == len(x) else conditioning.repeat(len(x))
            return family.velocity(transformer, x, levels, fitting, prompted.guidance)

        return velocity

    positive = under(prompted.positive)
    if prompted.cfg_scale <= 1:
        return positive
    return guided(positive, under(prompted.negative), prompted.cfg_scale)


@torch.no_grad()
def generate(
    family: ModelFamily,
    transformer: nn.Module,
    prompted: Prompted,
    noise: Tensor,
    steps: int,
    *,
    start: Tensor | None = None,
    strength: float = 1.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Integrate from noise [b c h w] to latents [b c h w].

    With `start` latents [b or 1, c h w] the run begins at the noise level that `strength` names: image-to-image.
    """
    mu = family.inference_mu(transformer, noise.shape[2] * noise.shape[3], steps)
    sigmas = schedule(steps, mu)
    if start is not None:
        sigmas = from_strength(sigmas, strength)
        level = torch.full((len(noise),), float(sigmas[0]), device=noise.device)
        noise = mix(start.expand_as(noise), noise, level)
    return euler(velocity_of(family, transformer, prompted), noise, sigmas, on_step)
