"""Masks, canvases and compositing: kept bytes are kept bytes."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from flux2_lora.flow import mix
from flux2_lora.inference.edit import Border, extend, keep_outside, lay_over, soften


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
