"""What a user types from memory, on the bundled model: every mode, and the laws that hold in each."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from flux2_lora import Pipeline
from flux2_lora.devices import largest_resident
from flux2_lora.errors import UserError
from flux2_lora.inference import starts
from flux2_lora.inference.memory import needed_bytes
from flux2_lora.inference.pictures import coding_bytes, decoded, encoded
from flux2_lora.lora_files import read_loras
from flux2_lora.quantize import PrecisionSpec
from flux2_lora.samplers import Filling
from flux2_lora.training.memory import MemorySpec, recompute_blocks
from tests.conftest import Command

QUICK: dict[str, Any] = {"steps": 3, "seed": 1}


@pytest.fixture(scope="module")
def pipeline(trained: Path) -> Pipeline:
    return Pipeline.load(trained, device="cpu")


def values(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB")).astype(int)


def photo(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height // 16, width // 16, 3), dtype="uint8")
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def hole(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    return mask


def test_a_picture_is_the_one_that_the_program_draws(pipeline: Pipeline, trained: Path, command: Command) -> None:
    pipeline.use([1.0])
    drawn = pipeline.generate("red apple", **QUICK)
    options = ("steps=3", "seed=1", "device=cpu", f"adapters=[{trained}]", "prompts=[red apple]")
    assert command("sample", *options).code == 0
    with Image.open("outputs/sample/0000.png") as saved:
        assert np.array_equal(values(drawn), values(saved))


def test_several_prompts_are_a_list_and_each_is_as_alone(pipeline: Pipeline) -> None:
    pipeline.use([1.0])
    together = pipeline.generate(["red apple", "cat face"], **QUICK)
    assert np.abs(values(together[1]) - values(pipeline.generate("cat face", **QUICK))).max() <= 1
    assert np.abs(values(together[0]) - values(together[1])).max() > 10


def test_strength_zero_is_the_base_and_image_to_image_at_zero_the_picture(pipeline: Pipeline, trained: Path) -> None:
    pipeline.use([0.0])
    base = Pipeline.load(trained, adapters=[], device="cpu")
    assert np.array_equal(values(pipeline.generate("red apple", **QUICK)), values(base.generate("red apple", **QUICK)))
    picture = photo(64, 64)
    given = decoded(base.family, base.vae, encoded(base.family, base.vae, picture, base.device).mean)[0]
    assert np.array_equal(values(base.redraw(picture, "red apple", strength=0.0, **QUICK)), values(given))


def test_a_scale_of_one_is_no_classifier_free_guidance(pipeline: Pipeline) -> None:
    plain = pipeline.generate("red apple", cfg_scale=1.0, **QUICK)
    other = pipeline.generate("red apple", cfg_scale=1.0, negative_prompt="cat face", **QUICK)
    assert np.array_equal(values(plain), values(other))
    steered = pipeline.generate("red apple", cfg_scale=3.0, negative_prompt="cat face", **QUICK)
    assert not np.array_equal(values(plain), values(steered))


def test_a_small_mask_on_a_large_picture_is_worked_at_the_size_of_training(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, box, worked = photo(320, 208), (150, 90, 170, 110), []
    painter = starts.draw_from

    def watched(start: starts.Start, *given: Any, **options: Any) -> list[Image.Image]:
        worked.append(start.picture.size)
        return painter(start, *given, **options)

    monkeypatch.setattr(starts, "draw_from", watched)
    after = values(pipeline.inpaint(picture, hole(picture.size, box), "red apple", padding_px=8, **QUICK))
    assert worked == [(128, 128)]
    kept = np.asarray(hole(picture.size, box)) == 0
    assert np.array_equal(after[kept], values(picture)[kept])
    assert (after[~kept] != values(picture)[~kept]).mean() > 0.5


def test_outpaint_keeps_every_pixel_and_shows_no_seam(pipeline: Pipeline) -> None:
    picture = photo(64, 64)
    after = values(pipeline.outpaint(picture, "red apple", right=32, top=16, **QUICK))
    assert after.shape == (80, 96, 3)
    assert np.array_equal(after[16:, :64], values(picture))
    across = np.abs(np.diff(after[16:, 63:65], axis=1)).mean()
    inside = np.abs(np.diff(after[16:, 64:], axis=1)).mean()
    assert across < 3 * inside + 3


def test_upscale_needs_no_more_memory_a_step_than_a_tile(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    velocity = type(pipeline.family).velocity

    def watched(family: Any, transformer: Any, latents: torch.Tensor, *given: Any) -> torch.Tensor:
        seen.append(tuple(latents.shape[2:]))
        return velocity(family, transformer, latents, *given)

    monkeypatch.setattr(type(pipeline.family), "velocity", watched)
    after = pipeline.upscale(photo(128, 128), "red apple", factor=2.5, **QUICK)
    assert after.size == (320, 320)
    assert set(seen) == {(8, 8)}


def test_merged_adapters_draw_what_live_ones_draw(pipeline: Pipeline, trained: Path) -> None:
    """The fp8 base is quantised again, so they are near and not equal; a strong adapter stands out of that."""
    pipeline.use([60.0])
    live = values(pipeline.generate("red apple", **QUICK))
    merged = Pipeline.load(trained, device="cpu")
    merged.merge([60.0])
    assert merged.adapters == []
    drawn = values(merged.generate("red apple", **QUICK))
    pipeline.use([0.0])
    base = values(pipeline.generate("red apple", **QUICK))
    assert np.abs(drawn - live).mean() < np.abs(base - live).mean() / 2


def test_heun_draws_another_picture_of_the_same(pipeline: Pipeline) -> None:
    euler, heun = (values(pipeline.generate("red apple", sampler=name, **QUICK)) for name in ("euler", "heun"))
    assert not np.array_equal(euler, heun)


def test_more_memory_is_estimated_than_a_step_takes_and_not_ten_times_more(pipeline: Pipeline) -> None:
    needed = needed_bytes(pipeline.transformer, pipeline.vae, pipeline.device, 1024, 1024, other_tokens=64)
    whole = needed + coding_bytes(pipeline.vae, 1024 * 1024)  # memory is not short here, so tiles are large
    before = largest_resident()
    pipeline.generate("red apple", height=1024, width=1024, steps=1, cfg_scale=1.0)
    taken = largest_resident() - before
    assert whole / 10 < taken < 1.5 * whole


def test_more_memory_is_estimated_than_a_step_back_takes_and_not_ten_times_more(pipeline: Pipeline) -> None:
    """What autograd keeps beside weights: the inputs of all blocks that are computed again, and the insides of one."""

    def kept_bytes(plain: Collection[int]) -> int:
        recompute_blocks(pipeline.transformer, plain)
        weights = {part.data_ptr() for part in pipeline.transformer.state_dict().values()}
        kept: dict[int, int] = {}

        def pack(part: torch.Tensor) -> torch.Tensor:
            kept[part.data_ptr()] = part.untyped_storage().nbytes()
            return part

        x, level = torch.randn(1, 128, 32, 32, requires_grad=True), torch.ones(1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda part: part):
            pipeline.family.velocity(pipeline.transformer, x, level, pipeline.encoded("red apple"))
        return sum(size for place, size in kept.items() if place not in weights)

    blocks, tokens = pipeline.model.blocks(), 16
    needed = needed_bytes(
        pipeline.transformer, pipeline.vae, pipeline.device, 512, 512, other_tokens=tokens, backward=True
    )
    inputs = kept_bytes(())
    inside = max(kept_bytes([block]) for block in range(blocks)) - inputs
    pipeline.transformer.disable_gradient_checkpointing()  # type: ignore[operator]
    assert needed / 10 < 2 * (inputs + inside) < needed


def test_a_streamed_model_is_bent_as_one_that_stays(pipeline: Pipeline, trained: Path) -> None:
    streamed = Pipeline.open(
        pipeline.model,
        PrecisionSpec(),
        read_loras([str(trained)], pipeline.model),
        pipeline.device,
        memory=MemorySpec(resident_blocks=1, slots=2),
    )
    pipeline.use([1.0])
    picture, fill = photo(64, 64), Filling(resample=2, reconstruction=True)
    mask = hole(picture.size, (20, 20, 50, 50))
    one, other = (which.inpaint(picture, mask, "red apple", fill=fill, **QUICK) for which in (pipeline, streamed))
    assert np.array_equal(values(one), values(other))
    assert not np.array_equal(values(one), values(pipeline.inpaint(picture, mask, "red apple", **QUICK)))


def test_a_folder_that_is_no_run_and_a_misspelt_option_are_said(pipeline: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not the folder of a run"):
        Pipeline.load(tmp_path)
    with pytest.raises(TypeError, match="stpes"):
        pipeline.generate("red apple", stpes=3)
    with pytest.raises(UserError, match="strength=2 is out of range"):
        pipeline.redraw(photo(64, 64), "red apple", strength=2.0)
