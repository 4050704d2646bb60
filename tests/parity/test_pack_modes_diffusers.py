"""The script beside a grid draws what was drawn from pictures: every mode, every family in some of them."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from flux2_lora.families import ModelSpec, open_model
from flux2_lora.inference.edit import Border, extend
from flux2_lora.inference.pack import save_inputs, write_pack
from flux2_lora.inference.pipeline import Pipeline
from flux2_lora.inference.request import portable, settings_of
from flux2_lora.inference.sampling import Recipe
from flux2_lora.inference.starts import Start, of_size
from flux2_lora.lora_files import read_loras
from flux2_lora.quantize import PrecisionSpec
from tests.miniatures import MINIATURES

CPU, PROMPT, RESOLUTION = torch.device("cpu"), "a red apple in photo style", 64
RECIPES = {
    "flux2_small": Recipe(steps=3, seed=7, cfg_scale=3.0, negative_prompt="a blue face"),
    "flux2_klein": Recipe(steps=3, seed=7, cfg_scale=3.0, negative_prompt="a blue face"),
    "flux2_dev": Recipe(steps=3, seed=7, guidance=3.5),
    "flux1": Recipe(steps=3, seed=7, guidance=3.5, cfg_scale=2.0),
    "flux1_schnell": Recipe(steps=3, seed=7),
}


@pytest.fixture(autouse=True)
def one_thread(two_threads: None) -> None:
    """Pictures this small are drawn faster by one."""
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Bench:
    """A miniature opened with our pipeline, and a folder for what it draws."""

    pipeline: Pipeline
    folder: Path
    monkeypatch: pytest.MonkeyPatch

    def both(
        self,
        start: Start | None,
        mode: str,
        strength: float | None,
        *,
        references: Sequence[Image.Image] = (),
        **how: Any,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ours, that of the script) [h w 3], of what is in the folder and nothing else."""
        pipeline, recipe = self.pipeline, Recipe(**{**vars(self.pipeline.recipe), **how})
        if start is None:
            ours = pipeline.generate(PROMPT, height=64, width=48, references=references, **how)
        else:
            assert strength is not None
            [ours] = pipeline.draw_from(start, [PROMPT], strength=strength, references=references, **how)
        settings = settings_of(
            pipeline.model,
            recipe,
            prompt=PROMPT,
            size=(ours.height, ours.width),
            mode=mode,
            strength=strength,
            references=len(references),
            inputs=save_inputs(self.folder, start, references),
        )
        write_pack(self.folder, settings)
        return np.asarray(ours).astype(float), self.scripted()

    def scripted(self) -> np.ndarray:
        """What the script of the folder saves."""
        self.monkeypatch.chdir(self.folder)
        self.monkeypatch.syspath_prepend(self.folder)
        for name in ("seams", "tiles"):  # of this folder, not of an earlier one
            sys.modules.pop(name, None)
        with torch.no_grad():
            runpy.run_path(str(self.folder / "with_diffusers.py"))
            torch.set_grad_enabled(True)
        with Image.open(self.folder / "diffusers-0000.png") as found:
            return np.asarray(found).astype(float)


_OPEN: dict[str, Pipeline] = {}


@pytest.fixture
def bench(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Bench:
    """Of the family that the test names; its pipeline is opened once."""
    name = request.param
    if name not in _OPEN:
        folder, recipe = tmp_path_factory.mktemp(name), RECIPES[name]
        MINIATURES[name].build(folder)
        spec = ModelSpec(
            family=MINIATURES[name].family,
            path=str(folder),
            title="miniature",
            architecture_name="",
            resolution=RESOLUTION,
            max_sequence_length=32,
        )
        prompts = [PROMPT, recipe.negative_prompt]
        _OPEN[name] = Pipeline.open(open_model(spec), PrecisionSpec(base="fp32"), {}, CPU, prompts=prompts)
        _OPEN[name].recipe = recipe
    return Bench(_OPEN[name], tmp_path, monkeypatch)


def families(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("bench", names, indirect=True)


def photo(height: int, width: int, seed: int = 3) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype="uint8")
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def hole(height: int, width: int, *box: int) -> Image.Image:
    """A mask that is grey along one side, and no whole number of tokens."""
    mask = Image.new("L", (width, height), 0)
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    ImageDraw.Draw(mask).rectangle((box[0], box[1], box[0] + 3, box[3]), fill=100)
    return mask


def assert_same(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Within 2 of 255 in 99.9 % of values."""
    assert ours.shape == theirs.shape
    assert (np.abs(ours - theirs) <= 2).mean() >= 0.999


@families(*RECIPES)
@pytest.mark.parametrize("strength", [0.6, 0.0])
def test_image_to_image(bench: Bench, strength: float) -> None:
    start = bench.pipeline.to_redraw(photo(60, 72))
    ours, theirs = bench.both(start, "image to image", strength)
    assert_same(ours, theirs)
    assert theirs.shape == (60, 72, 3)
    assert (np.abs(theirs - np.asarray(photo(60, 72))).max() > 2) or strength == 0


@families(*RECIPES)
def test_inpaint_of_the_whole_picture(bench: Bench) -> None:
    picture, mask = photo(60, 64), hole(60, 64, 10, 5, 40, 50)
    start = bench.pipeline.to_inpaint(picture, mask, crop="never")
    ours, theirs = bench.both(start, "inpaint", 1.0)
    assert_same(ours, theirs)
    kept = np.asarray(mask) == 0
    assert np.array_equal(theirs[kept], np.asarray(picture)[kept])
    assert np.abs(theirs - np.asarray(picture)).max() > 20


@families("flux2_klein", "flux1")
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_inpaint_around_a_mask(bench: Bench, sampler: str) -> None:
    picture, mask = photo(96, 120), hole(96, 120, 50, 40, 70, 61)
    start = bench.pipeline.to_inpaint(picture, mask, padding_px=8)
    assert start is not None
    assert start.region is not None
    assert start.region.box == (42, 32, 79, 70)
    ours, theirs = bench.both(start, "inpaint", 0.8, sampler=sampler)
    assert_same(ours, theirs)
    kept = np.asarray(mask) == 0
    assert np.array_equal(theirs[kept], np.asarray(picture)[kept])


@families("flux2_small", "flux1")
def test_outpaint(bench: Bench) -> None:
    canvas, mask = extend(photo(48, 40), Border(right=20, top=9))
    ours, theirs = bench.both(bench.pipeline.to_inpaint(canvas, mask, crop="never"), "outpaint", 1.0)
    assert_same(ours, theirs)
    assert np.array_equal(theirs[9:, :40], np.asarray(photo(48, 40)))


@families("flux2_klein", "flux1")
def test_upscale_in_tiles(bench: Bench) -> None:
    start = bench.pipeline.to_upscale(photo(48, 40), factor=3)
    ours, theirs = bench.both(start, "upscale", 0.7)
    assert_same(ours, theirs)
    assert theirs.shape == (144, 120, 3)
    [whole] = bench.pipeline.draw_from(replace(start, tile=9), [PROMPT], strength=0.7)
    assert (np.abs(np.asarray(whole) - theirs) > 2).mean() > 0.1


@families("flux2_klein", "flux2_dev")
def test_references(bench: Bench) -> None:
    references = [bench.pipeline.as_seen(photo(70, 90, 5)), bench.pipeline.as_seen(photo(64, 64, 6))]
    ours, theirs = bench.both(None, "text to image", None, references=references)
    assert_same(ours, theirs)
    without = bench.pipeline.generate(PROMPT, height=64, width=48)
    assert np.abs(np.asarray(without) - theirs).max() > 2


@families("flux2_klein")
def test_a_reference_is_scaled_once_and_never_above_what_diffusers_shows(bench: Bench) -> None:
    seen = bench.pipeline.as_seen(photo(1100, 1700))
    assert seen.width % 16 == seen.height % 16 == 0
    assert seen.width * seen.height <= 1024 * 1024
    assert bench.pipeline.as_seen(seen).tobytes() == seen.tobytes()


@families("flux2_klein")
def test_inpaint_beside_a_reference(bench: Bench) -> None:
    references = [bench.pipeline.as_seen(photo(70, 90, 5))]
    start = bench.pipeline.to_inpaint(photo(64, 64), hole(64, 64, 10, 5, 40, 50), crop="never")
    assert_same(*bench.both(start, "inpaint", 1.0, references=references))


@families("flux2_klein")
def test_adapters_of_some_blocks_with_factors(bench: Bench) -> None:
    model, rng, state = bench.pipeline.model, torch.Generator().manual_seed(1), {}
    for name in model.projections():
        height, width = model.weights.shapes[f"{name}.weight"]
        state[f"transformer.{name}.lora_A.weight"] = 0.1 * torch.randn(4, width, generator=rng)
        state[f"transformer.{name}.lora_B.weight"] = 0.2 * torch.randn(height, 4, generator=rng)
    file, blocks = bench.folder / "style.safetensors", ["double:0.5", "single[1:2]"]
    save_file(state, file)
    loras = read_loras([str(file)], model, blocks)
    own = Pipeline.open(model, PrecisionSpec(base="fp32"), loras, CPU, prompts=[PROMPT, ""])
    own.use([0.7])
    own.recipe = Recipe(steps=2, seed=7)
    ours = own.generate(PROMPT, height=64, width=48)
    [made] = portable([str(file)], loras, model, bench.folder, blocks=blocks)
    settings = settings_of(model, own.recipe, prompt=PROMPT, size=(64, 48), adapters=[(made, 0.7)], blocks=blocks)
    write_pack(bench.folder, settings)
    assert_same(np.asarray(ours).astype(float), bench.scripted())
    own.use([0.0])
    base = own.generate(PROMPT, height=64, width=48)
    assert np.abs(np.asarray(base).astype(int) - np.asarray(ours)).max() > 2


@families("flux2_small")
def test_each_prompt_is_drawn_from_its_own_picture(bench: Bench) -> None:
    pipeline, texts = bench.pipeline, [PROMPT, "blue cat face"]
    starts = [of_size(photo(64, 64, seed), 64, 64) for seed in (3, 4)]
    first, second = (
        replace(
            settings_of(
                pipeline.model, pipeline.recipe, prompt=text, size=(64, 64), mode="image to image", strength=0.6
            ),
            inputs=save_inputs(bench.folder, start),
        )
        for text, start in zip(texts, starts, strict=True)
    )
    write_pack(bench.folder, first, second)
    bench.scripted()
    with Image.open("diffusers-0001.png") as found:
        [ours] = pipeline.draw_from(starts[1], texts[1:], strength=0.6)
        assert_same(np.asarray(ours).astype(float), np.asarray(found).astype(float))
