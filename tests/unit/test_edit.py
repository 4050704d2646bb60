"""Masks, canvases and compositing: kept bytes are kept bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from flux2_lora.flow import mix
from flux2_lora.inference.edit import Border, around, border_for, extend, keep_outside, lay_over, soften
from flux2_lora.inference.pictures import mask_of


def noise_picture(size: tuple[int, int], seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype="uint8"))


def test_where_the_mask_is_black_the_original_stays_byte_for_byte() -> None:
    below, above = noise_picture((20, 10), 0), noise_picture((20, 10), 1)
    mask = Image.fromarray(np.tile(np.arange(0, 200, 10, dtype="uint8"), (10, 1)))
    result = np.asarray(lay_over(below, above, mask))
    kept = np.asarray(mask) == 0
    assert np.array_equal(result[kept], np.asarray(below)[kept])


def test_where_the_mask_is_white_the_painting_stands() -> None:
    below, above = noise_picture((4, 4), 0), noise_picture((4, 4), 1)
    assert np.array_equal(np.asarray(lay_over(below, above, Image.new("L", (4, 4), 255))), np.asarray(above))


def test_a_softened_mask_never_reaches_beyond_the_drawn_one() -> None:
    hard = np.zeros((64, 64), dtype="uint8")
    hard[20:50, 20:50] = 255
    soft = np.asarray(soften(Image.fromarray(hard), 8))
    assert (soft[hard == 0] == 0).all()
    assert soft[35, 35] == 255
    assert 0 < soft[21, 35] < 255


def test_an_extended_canvas_keeps_the_picture_and_marks_what_is_new() -> None:
    picture = noise_picture((6, 4), 2)
    canvas, mask = extend(picture, Border(left=3, bottom=2))
    assert canvas.size == mask.size == (9, 6)
    assert np.array_equal(np.asarray(canvas)[:4, 3:], np.asarray(picture))
    assert np.asarray(mask)[:4, 3:].max() == 0
    assert (np.asarray(mask).sum() // 255) == 9 * 6 - 6 * 4


def test_the_kept_region_follows_its_own_noise_level() -> None:
    latents, noise, x = torch.randn(1, 2, 2, 2), torch.randn(1, 2, 2, 2), torch.randn(1, 2, 2, 2)
    mask = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    result = keep_outside(mask, latents, noise)(x, 0.25)
    kept = (mask == 0).expand_as(x)
    assert torch.equal(result[kept], mix(latents, noise, torch.tensor([0.25]))[kept])
    assert torch.equal(result[~kept], x[~kept])


def smooth_picture(size: int = 64) -> Image.Image:
    ramp = np.linspace(40, 200, size)
    return Image.fromarray(
        np.stack([ramp[None].repeat(size, 0), ramp[:, None].repeat(size, 1), ramp[None].repeat(size, 0)], 2).astype(
            "uint8"
        )
    )


@pytest.mark.parametrize("hole", [(16, 16, 48, 48), (32, 0, 64, 64)], ids=["inpaint", "outpaint"])
def test_a_border_shows_no_seam(hole: tuple[int, int, int, int]) -> None:
    """The autoencoder's colours are off by 12 everywhere; across the border the picture is as smooth as elsewhere."""
    original = smooth_picture()
    painted = Image.fromarray((np.asarray(original).astype(int) + 12).astype("uint8"))
    mask = Image.new("L", original.size, 0)
    mask.paste(255, hole)
    result = np.asarray(lay_over(original, painted, mask)).astype(int)
    smooth = np.abs(np.diff(np.asarray(original).astype(int), axis=1)).max()
    assert np.abs(np.diff(result, axis=1)).max() <= smooth + 1
    assert np.abs(np.diff(result, axis=0)).max() <= smooth + 1
    pasted = np.where(np.asarray(mask)[..., None] > 0, np.asarray(painted), np.asarray(original)).astype(int)
    assert np.abs(np.diff(pasted, axis=1)).max() >= 12


def test_what_was_painted_is_shifted_and_not_replaced() -> None:
    original = smooth_picture()
    values = np.asarray(original).astype(int) + 12
    values[28:36, 28:36] = 5
    mask = Image.new("L", original.size, 0)
    mask.paste(255, (16, 16, 48, 48))
    result = np.asarray(lay_over(original, Image.fromarray(values.astype("uint8")), mask)).astype(int)
    assert result[28:36, 28:36].max() <= 5
    assert np.abs(result[18:26, 18:26] - np.asarray(original)[18:26, 18:26]).max() <= 2


def test_masks_are_what_is_bright_painted_or_transparent() -> None:
    grey = Image.new("L", (2, 1))
    grey.putdata([0, 128])
    painted = Image.new("RGB", (2, 1))
    painted.putdata([(0, 0, 0), (255, 0, 0)])
    erased = Image.new("RGBA", (2, 1))
    erased.putdata([(9, 9, 9, 255), (9, 9, 9, 0)])
    opaque = painted.convert("RGBA")
    assert list(mask_of(opaque).get_flattened_data()) == [0, 255]
    assert [list(mask_of(mask).get_flattened_data()) for mask in (grey, painted, erased)] == [
        [0, 128],
        [0, 255],
        [0, 255],
    ]


def test_the_surroundings_of_a_mask_stay_on_the_canvas() -> None:
    mask = Image.new("L", (100, 50), 0)
    assert around(mask, 8) is None
    mask.paste(255, (0, 20, 10, 30))
    assert around(mask, 8) == (0, 12, 18, 38)


@pytest.mark.parametrize(("ratio", "size"), [(16 / 9, (178, 100)), (1.0, (100, 100)), (0.5, (100, 200))])
def test_a_ratio_is_reached_by_the_least_border(ratio: float, size: tuple[int, int]) -> None:
    border = border_for(100, 100, ratio)
    assert (100 + border.left + border.right, 100 + border.top + border.bottom) == size
    assert abs(border.left - border.right) <= 1
