"""The family on the bundled weights against Diffusers' own pipeline: same embeddings, velocities, pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flux2_lora.dataset.pictures import crop_to, open_picture
from flux2_lora.families import Model
from flux2_lora.inference.pictures import to_pictures
from flux2_lora.inference.sampling import Prompted, generate, initial_noise
from flux2_lora.quantize import PrecisionSpec, load_frozen
from flux2_lora.samplers import empirical_mu, schedule


@pytest.fixture(scope="module")
def pipeline(tiny: Path) -> Any:
    from diffusers import Flux2KleinPipeline

    pipeline = Flux2KleinPipeline.from_pretrained(tiny, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(("tokens", "steps"), [(16, 20), (4096, 28), (5000, 50)])
def test_the_schedule_is_that_of_diffusers(pipeline: Any, tokens: int, steps: int) -> None:
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=empirical_mu(tokens, steps))
    torch.testing.assert_close(schedule(steps, empirical_mu(tokens, steps)), scheduler.sigmas, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80)])
def test_a_seed_draws_the_picture_that_diffusers_draws(
    tiny_model: Model, pipeline: Any, height: int, width: int
) -> None:
    cpu, family = torch.device("cpu"), tiny_model.family
    positive, negative = tiny_model.load_prompt_encoder(cpu)(["red apple, noto style", "blue"])
    theirs = pipeline(
        prompt_embeds=positive.embeds,
        negative_prompt_embeds=negative.embeds,
        height=height,
        width=width,
        num_inference_steps=5,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
    ).images[0]
    prompted = Prompted(positive=positive, negative=negative, cfg_scale=3.0, guidance=None)
    transformer = load_frozen(tiny_model, PrecisionSpec(base="fp32"), cpu)
    latents = generate(family, transformer, prompted, initial_noise(family, height, width, [7]), 5)
    ours = np.asarray(to_pictures(family.decode_latents(tiny_model.load_vae(cpu), latents))[0])
    assert np.abs(ours.astype(float) - theirs * 255).max() <= 1.0


def test_pixels_are_encoded_as_diffusers_encodes_them(tiny_model: Model, pipeline: Any) -> None:
    vae = tiny_model.load_vae(torch.device("cpu"))
    pixels = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    theirs = pipeline._encode_vae_image(pixels, torch.Generator())
    torch.testing.assert_close(tiny_model.family.encode_pixels(vae, pixels).mean, theirs, atol=1e-5, rtol=1e-5)


def test_the_bundled_vae_gives_a_picture_of_an_unseen_style_back_at_20_db(tiny_model: Model, tiny: Path) -> None:
    family, vae = tiny_model.family, tiny_model.load_vae(torch.device("cpu"))
    pictures = sorted((tiny.parent / "demo" / "validation").glob("*.png"))
    pixels = torch.stack([crop_to(open_picture(path).image, 64, 64) for path in pictures])
    decoded = family.decode_latents(vae, family.encode_pixels(vae, pixels).mean)
    psnr = -10 * torch.log10(((decoded - pixels) / 2).square().mean((1, 2, 3)))
    assert len(pictures) >= 40
    assert psnr.mean() > 20
