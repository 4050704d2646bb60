"""From prompts and a seed to latents over a family's velocity: the same few lines for previews and for programs.

Seeds mean what they mean in Diffusers: what is random in a picture comes from one CPU generator of its seed, drawn in
the pipeline's order and shape, so the same seed, size and recipe give the picture that the Diffusers pipeline of the
family gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from flux2_lora.conditioning import Conditioning
from flux2_lora.errors import RunError
from flux2_lora.families import ModelFamily
from flux2_lora.flow import mix
from flux2_lora.latents import Posterior
from flux2_lora.options import option
from flux2_lora.samplers import SAMPLERS, OnStep, Sampler, Velocity, euler, from_strength, guided, schedule
from flux2_lora.tiles import tiled
from flux2_lora.training.shortage import cause_of

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How pictures are sampled, whatever they show. guidance: of models with an embedding for it, 1 where null.

    cfg_scale: of true classifier-free guidance against negative_prompt, which takes two passes a step; 1 for none.
    """

    negative_prompt: str = ""
    steps: int = option(50, at_least=1)
    sampler: str = option("euler", one_of=tuple(SAMPLERS))
    guidance: float | None = option(None, at_least=0)
    cfg_scale: float = option(1.0, at_least=0)
    seed: int = option(0, at_least=0)


@dataclass(frozen=True, kw_only=True)
class Prompted:
    """What steers a batch of pictures. positive: of b; negative: of 1 or b, used where cfg_scale > 1.

    references: latents [1 c h w] of pictures that the model looks at, where its family takes them.
    """

    positive: Conditioning
    negative: Conditioning
    cfg_scale: float
    guidance: float | None
    references: Sequence[Tensor] = ()


def initial_noise(family: ModelFamily, height_px: int, width_px: int, seeds: Sequence[int]) -> Tensor:
    """Standard normal latents [b c h w], one seed a picture; pixels rounded down to whole tokens."""
    side = family.pixels_per_token
    height, width = height_px // side, width_px // side
    return torch.cat([family.draw_noise(height, width, torch.Generator().manual_seed(seed)) for seed in seeds])


def start_and_noise(family: ModelFamily, posterior: Posterior, seed: int) -> tuple[Tensor, Tensor]:
    """What image-to-image starts from: the picture's latents and their noise, both [1 c h w]."""
    stream, (height, width) = torch.Generator().manual_seed(seed), posterior.mean.shape[2:]
    latents = posterior.mean
    if family.samples_posterior:
        latents = latents + posterior.std * family.draw_noise(height, width, stream).to(latents)
    return latents, family.draw_noise(height, width, stream).to(latents)


def velocity_of(family: ModelFamily, transformer: nn.Module, prompted: Prompted) -> Velocity:
    """The transformer as a `Velocity` under its prompts, with true CFG where cfg_scale > 1."""

    def under(conditioning: Conditioning) -> Velocity:
        def velocity(x: Tensor, sigma: float) -> Tensor:
            levels = torch.full((len(x),), sigma, device=x.device)
            fitting = conditioning if len(conditioning) == len(x) else conditioning.repeat(len(x))
            return family.velocity(transformer, x, levels, fitting, prompted.guidance, prompted.references)

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
    sampler: Sampler = euler,
    sigmas: Tensor | None = None,
    tile: int | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Integrate from noise [b c h w] to latents [b c h w].

    With `start` latents [b or 1, c h w] the run begins at the noise level that `strength` names: image-to-image.
    sigmas: noise levels in place of the family's schedule and `strength`. tile: tokens along a side that the model sees
    at once, null for all of the picture; tiles overlap by half.
    """
    velocity, tokens = velocity_of(family, transformer, prompted), noise.shape[2] * noise.shape[3]
    if tile is not None:
        velocity = tiled(velocity, tile, tile // 2)
    if sigmas is None:
        sigmas = schedule(steps, family.inference_mu(transformer, tokens, steps))
        sigmas = sigmas if start is None else from_strength(sigmas, strength)
    if start is not None:
        level = torch.full((len(noise),), float(sigmas[0]), device=noise.device)
        noise = mix(start.expand_as(noise), noise, level)
    return sampler(velocity, noise, sigmas, on_step)


def split_to_fit(make: Callable[[Sequence[Item]], list[Made]], items: Sequence[Item]) -> list[Made]:
    """All that `make` makes of `items`: at once where memory suffices, else of halves, down to one by one.

    RunError where it does not suffice for one.
    """
    try:
        return make(items)
    except torch.OutOfMemoryError as error:
        if len(items) == 1:
            raise RunError(
                f"memory ran out while one picture was drawn ({cause_of(error)})",
                "draw it smaller (height, width; upscale enlarges it in tiles), or set memory=stream",
            ) from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = len(items) // 2
    return [*split_to_fit(make, items[:half]), *split_to_fit(make, items[half:])]
