"""A picture file becomes what a person sees: checked pixel by pixel."""

from __future__ import annotations

import random
import struct
import zlib
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from flux2_lora.dataset.pictures import UnreadableError, crop_mask, crop_to, open_mask, open_picture


def pixel(path: Path) -> tuple[int, ...]:
    found = open_picture(path).image.getpixel((0, 0))
    assert isinstance(found, tuple)
    return found


@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_exif_orientation_is_undone(tmp_path: Path, orientation: int) -> None:
    upright = Image.fromarray(np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation -> the Transpose that a camera would have applied
    seen = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    seen.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(open_picture(tmp_path / "a.png").image), np.asarray(upright))


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16)).save(tmp_path / "a.png")
    assert np.asarray(open_picture(tmp_path / "a.png").image)[0].tolist() == [[0] * 3, [100] * 3, [255] * 3]


def test_a_dark_sixteen_bit_picture_stays_dark(tmp_path: Path) -> None:
    Image.fromarray(np.full((2, 2), 200, dtype=np.uint16)).save(tmp_path / "a.png")
    assert pixel(tmp_path / "a.png") == (1, 1, 1)


def test_floats_from_zero_to_one_are_scaled(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 0.2, 1]], dtype=np.float32)).save(tmp_path / "a.tiff")
    assert np.asarray(open_picture(tmp_path / "a.tiff").image)[0, :, 0].tolist() == [0, 51, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_are_white_and_not_their_hidden_colour(tmp_path: Path, mode: str) -> None:
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).convert(mode).save(tmp_path / "a.png")
    assert pixel(tmp_path / "a.png") == (255, 255, 255)


def test_half_transparent_pixels_are_mixed_with_white(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (0, 0, 0, 128)).save(tmp_path / "a.png")
    assert pixel(tmp_path / "a.png") == (127, 127, 127)


def test_a_transparent_palette_entry_is_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 2), 3)
    image.putpalette([9] * 30)
    image.save(tmp_path / "a.png", transparency=3)
    assert pixel(tmp_path / "a.png") == (255, 255, 255)


@pytest.mark.filterwarnings("error")
def test_a_palette_with_alpha_is_mixed_without_a_warning(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (0, 0, 0, 128)).quantize().save(tmp_path / "a.png")
    assert pixel(tmp_path / "a.png") == (127, 127, 127)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_every_usual_mode_keeps_white_white(tmp_path: Path, mode: str) -> None:
    Image.new("RGB", (2, 2), "white").convert(mode).save(tmp_path / "a.tiff")
    assert pixel(tmp_path / "a.tiff") == (255, 255, 255)


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert pixel(tmp_path / "a.gif") == (255, 0, 0)


def swapped_primaries() -> bytes:
    """An sRGB profile whose red and blue primaries change places: what it calls red is blue."""
    raw = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return raw.replace(b"rXYZ", b"????", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"????", b"bXYZ", 1)


def test_a_colour_profile_is_converted_to_srgb(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2), (255, 0, 0)).save(tmp_path / "a.png", icc_profile=swapped_primaries())
    assert max(abs(a - b) for a, b in zip(pixel(tmp_path / "a.png"), (0, 0, 255), strict=True)) <= 2


def test_an_srgb_profile_changes_nothing_visible(tmp_path: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("RGBA", (2, 2), (200, 100, 50, 255)).save(tmp_path / "a.png", icc_profile=srgb)
    assert max(abs(a - b) for a, b in zip(pixel(tmp_path / "a.png"), (200, 100, 50), strict=True)) <= 1


def test_a_grey_picture_may_carry_a_colour_profile(tmp_path: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("L", (2, 2), 90).save(tmp_path / "a.jpg", icc_profile=srgb)
    assert max(abs(value - 90) for value in pixel(tmp_path / "a.jpg")) <= 1


def test_a_profile_for_other_colours_is_a_reason_to_skip(tmp_path: Path) -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    Image.new("RGB", (2, 2)).save(tmp_path / "bad.png", icc_profile=lab)
    with pytest.raises(UnreadableError, match="its colour profile is for Lab, its pixels are RGB"):
        open_picture(tmp_path / "bad.png")


def test_alpha_comes_apart_from_the_colours(tmp_path: Path) -> None:
    Image.fromarray(np.array([[[9, 9, 9, 0], [9, 9, 9, 255]]], dtype=np.uint8)).save(tmp_path / "a.png")
    opened = open_picture(tmp_path / "a.png", background="#00ff00")
    assert opened.alpha is not None
    assert np.asarray(opened.alpha).tolist() == [[0, 255]]
    assert np.asarray(opened.image)[0].tolist() == [[0, 255, 0], [9, 9, 9]]


def test_alpha_is_turned_with_the_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.array([[[9, 9, 9, 0], [9, 9, 9, 255]]], dtype=np.uint8)).save(tmp_path / "a.png", exif=exif)
    opened = open_picture(tmp_path / "a.png")
    assert opened.alpha is not None
    assert np.asarray(opened.alpha).tolist() == [[0], [255]]


def test_sixteen_bit_colours_are_scaled(tmp_path: Path) -> None:
    """Pillow reads 16-bit RGB as 8 bits; this is a PNG that was written by hand."""
    (tmp_path / "a.png").write_bytes(deep_png([0, 100 * 257, 65535]))
    assert pixel(tmp_path / "a.png") == (0, 100, 255)


def deep_png(rgb: list[int]) -> bytes:
    """One pixel of 16 bits a channel."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"\0" + struct.pack(">3H", *rgb)))
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_says_that_it_is_one(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(
        tmp_path / "a", kind, save_all=True, append_images=frames[1:], **{"lossless": True} if kind == "WEBP" else {}
    )
    opened = open_picture(tmp_path / "a")
    assert opened.moving
    assert opened.image.getpixel((0, 0)) == (255, 0, 0)


def test_a_phones_jpeg_with_a_second_picture_is_no_film(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (8, 8), "blue")
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
    with Image.open(tmp_path / "a.jpg") as opened:
        assert opened.format == "MPO"
    assert not open_picture(tmp_path / "a.jpg").moving


def test_heic_is_read_upright() -> None:
    heif = pytest.importorskip("pillow_heif")
    upright = Image.new("RGB", (64, 32), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = BytesIO()
    heif.register_heif_opener()
    upright.transpose(Image.Transpose.ROTATE_90).save(raw, "HEIF", exif=exif.tobytes(), quality=95)
    opened = open_picture(raw.getvalue())
    assert opened.image.size == (64, 32)
    assert max(abs(a - b) for a, b in zip(opened.image.getpixel((5, 5)), (255, 0, 0), strict=True)) <= 6


def test_a_colour_profile_is_converted_as_littlecms_does(tmp_path: Path) -> None:
    """Every pixel of a gradient, against the conversion done directly."""
    ramp = np.stack(np.meshgrid(np.arange(0, 256, 5), np.arange(0, 256, 5)), axis=-1).astype(np.uint8)
    values = np.concatenate([ramp, 255 - ramp[..., :1]], axis=-1)
    image = Image.fromarray(values)
    image.save(tmp_path / "a.png", icc_profile=swapped_primaries())
    swapped = ImageCms.ImageCmsProfile(BytesIO(swapped_primaries()))
    wanted = ImageCms.profileToProfile(image, swapped, ImageCms.createProfile("sRGB"))
    assert wanted is not None
    found = np.asarray(open_picture(tmp_path / "a.png").image).astype(int)
    assert np.abs(found - np.asarray(wanted).astype(int)).max() <= 2
    assert np.abs(found - values.astype(int)).max() > 100


def test_a_large_deep_grey_is_scaled_in_strips(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 3000 * 3000).reshape(3000, 3000).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.tif")
    found = np.asarray(open_picture(tmp_path / "a.tif").image)[..., 0]
    assert np.abs(found - values / 257).max() <= 0.5


def test_mutated_pictures_raise_one_exception_only(tmp_path: Path) -> None:
    rng = random.Random(0)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8))
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF"):
        whole = BytesIO()
        noise.save(whole, kind, **({} if kind in ("BMP", "GIF") else {"exif": exif, "icc_profile": srgb}))
        for _ in range(40):
            damaged = bytearray(whole.getvalue())
            for _ in range(rng.choice((1, 2, 8))):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            path = tmp_path / "mutated.png"
            path.write_bytes(damaged)
            with suppress(UnreadableError):
                assert open_picture(path, max_pixels=1_000_000).image.mode == "RGB"


# --- crops


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([(16, 32), (32, 16), (16, 16)]))
def test_a_crop_has_the_asked_size_and_range(width: int, height: int, bucket: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels = crop_to(Image.fromarray(noise), *bucket)
    assert pixels.shape == (3, *bucket)
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    assert -1 <= pixels.min() <= pixels.max() <= 1


def test_a_crop_of_the_same_size_is_the_picture_itself() -> None:
    values = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    assert torch.equal(crop_to(Image.fromarray(values), 4, 4), torch.tensor(values).permute(2, 0, 1) / 255 * 2 - 1)


def test_a_crop_keeps_the_centre() -> None:
    image = ImageOps.expand(Image.new("RGB", (8, 8), "white"), (4, 0), "black")
    assert torch.all(crop_to(image, 8, 8) == 1)


def test_a_crop_lies_where_centering_says() -> None:
    image = Image.fromarray(np.repeat(np.arange(4, dtype=np.uint8)[None, :, None] * 80, 2, axis=0).repeat(3, axis=2))
    left, right = crop_to(image, 2, 2, (0, 0.5)), crop_to(image, 2, 2, (1, 0.5))
    assert ((left[0, 0] + 1) * 127.5).round().tolist() == [0, 80]
    assert ((right[0, 0] + 1) * 127.5).round().tolist() == [160, 240]


def test_a_mask_is_averaged_over_each_cell() -> None:
    mask = Image.fromarray(np.kron(np.array([[0, 255], [255, 0]]), np.ones((8, 8))).astype(np.uint8))
    assert crop_mask(mask, 2, 2).tolist() == [[[0, 1], [1, 0]]]
    assert crop_mask(mask, 1, 1).tolist() == [[[pytest.approx(0.5, abs=0.01)]]]


def test_a_mask_is_cropped_as_its_picture_is() -> None:
    """A white square in black, as picture and as mask: the same cells are white in both, wherever the crop lies."""
    values = np.zeros((64, 160), dtype=np.uint8)
    values[16:48, 96:144] = 255
    mask = Image.fromarray(values)
    for x in (0.0, 0.3, 0.5, 1.0):
        seen = crop_to(mask.convert("RGB"), 64, 64, (x, 0.5))[0] > 0
        cells = crop_mask(mask, 4, 4, (x, 0.5))[0]
        assert torch.allclose(seen.float().reshape(4, 16, 4, 16).mean(dim=(1, 3)), cells, atol=0.07)


def test_a_painted_mask_counts_transparency_as_black(tmp_path: Path) -> None:
    Image.fromarray(np.array([[[255, 255, 255, 0], [255, 255, 255, 255]]], dtype=np.uint8)).save(tmp_path / "m.png")
    assert np.asarray(open_mask(tmp_path / "m.png")).tolist() == [[0, 255]]


def test_floats_that_shoot_over_a_little_stay_bright(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 0.2, 1.01]], dtype=np.float32)).save(tmp_path / "a.tiff")
    assert np.asarray(open_picture(tmp_path / "a.tiff").image)[0, :, 0].tolist() == [0, 51, 255]
