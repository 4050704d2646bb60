"""Every mode that has a pipeline in Diffusers against it: text to image, image to image, inpaint; random weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn

from flux2_lora.families import Model, ModelSpec, open_model
from flux2_lora.inference.edit import keep_outside
from flux2_lora.inference.pictures import decoded, encoded
from flux2_lora.inference.sampling import Prompted, generate, initial_noise, start_and_noise
from flux2_lora.quantize import PrecisionSpec, load_frozen
from tests.miniatures import MINIATURES

CPU, PROMPT, SEED, STRENGTH, TOKENS = torch.device("cpu"), "a red apple in photo style", 7, 0.6, 32
RUNS = [(4, (64, 64)), (28, (96, 64))]


@dataclass(frozen=True)
class Pair:
    """The same weights twice, and the pictures that both are given."""

    pipeline: Any
    model: Model
    transformer: nn.Module
    vae: nn.Module
    prompted: Prompted
    guidance: dict[str, Any]

    def theirs(self, kind: str, height: int, width: int, steps: int, **options: Any) -> np.ndarray:
        """What the pipeline class `kind`, made of the same parts, draws; [h w 3] of 255."""
        import diffusers

        pipeline = getattr(diffusers, kind)(**self.pipeline.components)
        pipeline.set_progress_bar_config(disable=True)
        drawn = pipeline(
            prompt=PROMPT,
            height=height,
            width=width,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(SEED),
            output_type="np",
            max_sequence_length=TOKENS,
            **self.guidance,
            **options,
        )
        picture: np.ndarray = drawn.images[0] * 255
        return picture

    def ours(self, steps: int, **options: Any) -> np.ndarray:
        latents = generate(
            self.model.family, self.transformer, options.pop("prompted", self.prompted), steps=steps, **options
        )
        return np.asarray(decoded(self.model.family, self.vae, latents)[0]).astype(float)


def pair_of(name: str, folder: Path) -> Pair:
    miniature = MINIATURES[name]
    pipeline = miniature.build(folder)
    model = open_model(
        ModelSpec(family=miniature.family, path=str(folder), title="", architecture_name="", max_sequence_length=TOKENS)
    )
    positive, negative = model.load_prompt_encoder(CPU)([PROMPT, ""])
    scale = 4.0 if miniature.family == "flux2_klein" else 1.0
    return Pair(
        pipeline=pipeline,
        model=model,
        transformer=load_frozen(model, PrecisionSpec(base="fp32"), CPU),
        vae=model.load_vae(CPU),
        prompted=Prompted(positive=positive, negative=negative, cfg_scale=scale, guidance=3.5),
        guidance={"guidance_scale": scale if scale > 1 else 3.5},
    )


@pytest.fixture(scope="module", params=["flux1", "flux2_klein", "flux2_dev"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair_of(request.param, tmp_path_factory.mktemp(request.param))


def picture(height: int, width: int) -> Image.Image:
    values = np.random.default_rng(3).integers(0, 256, (height // 16, width // 16, 3), dtype="uint8")
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def hole(height: int, width: int) -> Image.Image:
    """A mask of whole tokens, as pipelines differ in how they round others."""
    mask = Image.new("L", (width, height), 0)
    ImageDraw.Draw(mask).rectangle((16, 16, width - 17, height // 2 - 1), fill=255)
    return mask


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert (np.abs(ours - theirs) <= 2).mean() >= 0.999


PIPELINES = {"flux1": "FluxPipeline", "flux2_klein": "Flux2KleinPipeline", "flux2_dev": "Flux2Pipeline"}


@pytest.mark.parametrize(("steps", "size"), RUNS)
def test_text_to_image(pair: Pair, steps: int, size: tuple[int, int]) -> None:
    theirs = pair.theirs(PIPELINES[pair.model.family.name], *size, steps)
    assert_same(pair.ours(steps, noise=initial_noise(pair.model.family, *size, [SEED])), theirs)


@pytest.mark.parametrize(("steps", "size"), RUNS)
def test_image_to_image(pair: Pair, steps: int, size: tuple[int, int]) -> None:
    if pair.model.family.name != "flux1":
        pytest.skip("Diffusers has no pipeline of this kind for FLUX.2")
    theirs = pair.theirs("FluxImg2ImgPipeline", *size, steps, image=picture(*size), strength=STRENGTH)
    start, noise = start_and_noise(pair.model.family, encoded(pair.model.family, pair.vae, picture(*size), CPU), SEED)
    assert_same(pair.ours(steps, noise=noise, start=start, strength=STRENGTH), theirs)


@pytest.mark.parametrize(("steps", "size"), RUNS)
def test_inpaint(pair: Pair, steps: int, size: tuple[int, int]) -> None:
    family = pair.model.family
    kinds = {"flux1": "FluxInpaintPipeline", "flux2_klein": "Flux2KleinInpaintPipeline"}
    if family.name not in kinds:
        pytest.skip("Diffusers has no pipeline of this kind for FLUX.2 dev")
    given = {"image": picture(*size), "mask_image": hole(*size), "strength": STRENGTH}
    theirs = pair.theirs(kinds[family.name], *size, steps, **given)
    start, noise = start_and_noise(family, encoded(family, pair.vae, picture(*size), CPU), SEED)
    mask = torch.from_numpy(np.array(hole(*size)))[None, None, ::16, ::16].float() / 255
    prompted = pair.prompted
    if family.takes_references:  # this pipeline always shows the picture itself to the model
        prompted = Prompted(
            positive=prompted.positive,
            negative=prompted.negative,
            cfg_scale=prompted.cfg_scale,
            guidance=None,
            references=[start],
        )
    kept = keep_outside(mask, start, noise)
    ours = pair.ours(steps, noise=noise, start=start, strength=STRENGTH, on_step=kept, prompted=prompted)
    assert_same(ours, theirs)
    alone = pair.ours(steps, noise=noise, start=start, strength=STRENGTH, prompted=prompted)
    assert np.abs(alone - theirs).max() > 2
