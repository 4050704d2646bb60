"""What `scan` makes of the folders and pictures that people have."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from flux2_lora.dataset import (
    UNREADABLE,
    DatasetSpec,
    Record,
    crop_to,
    hold_out,
    open_rgb,
    scan,
    scan_validation,
    with_trigger,
)
from flux2_lora.errors import UserError
from flux2_lora.options import check

WORDS = st.text(alphabet="abc ,.[]", max_size=30)


def picture(path: Path, caption: str | bytes | None = "a caption", size: tuple[int, int] = (8, 6), **how: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, how.pop("colour", "red")).save(path, **how)
    if caption is not None:
        raw = caption if isinstance(caption, bytes) else caption.encode()
        path.with_suffix(".txt").write_bytes(raw)
    return path


def spec(folder: Path, **options: Any) -> DatasetSpec:
    return DatasetSpec(folder=str(folder), **options)


def captions(folder: Path, **options: Any) -> list[str]:
    return [record.caption for record in scan(spec(folder, **options)).records]


def names(folder: Path) -> list[str]:
    return [record.path.relative_to(folder).as_posix() for record in scan(spec(folder)).records]


def error_of(action: Callable[[], object]) -> UserError:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in caught.value.what + caught.value.remedy
    return caught.value


def pixel(path: Path) -> tuple[int, ...]:
    found = open_rgb(path).getpixel((0, 0))
    assert isinstance(found, tuple)
    return found


# --- which files


def test_pictures_of_all_kinds_are_found_below_the_folder_in_order(tmp_path: Path) -> None:
    wanted = ["a.png", "b/c.JPG", "b/d.webp", "b/e/f.gif", "g.bmp", "h.tif", "i.tiff", "j.jpeg", "k.avif"]
    for name in reversed(wanted):
        picture(tmp_path / name)
    assert names(tmp_path) == wanted


@pytest.mark.parametrize("name", [".hidden.png", ".cache/a.png", "a-masklabel.png", "validation/a.png", "notes.pdf"])
def test_files_that_are_no_training_pictures_are_left_out(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / name, format="PNG")
    assert names(tmp_path) == ["a.png"]


def test_a_record_has_the_size_as_seen_and_the_digest_of_the_file(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "a.jpg", size=(9, 6), exif=exif)
    picture(tmp_path / "b.jpg", size=(9, 6), exif=exif)
    first, second = scan(spec(tmp_path)).records
    assert (first.width, first.height) == (6, 9)
    assert first.digest == second.digest


def test_a_new_date_leaves_the_digest_and_new_content_changes_it(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    before = scan(spec(tmp_path)).records
    path.touch()
    assert scan(spec(tmp_path)).records == before
    picture(path, colour="blue")
    assert scan(spec(tmp_path)).records[0].digest != before[0].digest


# --- captions


@pytest.mark.parametrize(
    "raw",
    [
        "un café".encode(),
        "un café".encode("utf-8-sig"),
        "un café".encode("utf-16"),
        b"\xfe\xff" + "un café".encode("utf-16-be"),
        "un café".encode("latin-1"),
        "  un\r\n\tcafé \n".encode(),
        "un\0café".encode(),
    ],
)
def test_a_caption_is_read_in_any_usual_encoding_onto_one_line(tmp_path: Path, raw: bytes) -> None:
    picture(tmp_path / "a.png", raw)
    assert captions(tmp_path) == ["un café"]


@given(st.binary(max_size=200))
def test_no_caption_file_crashes_the_scan(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    picture(folder / "a.png", raw)
    (caption,) = captions(folder, default_caption="x", trigger_word="y")
    assert caption == " ".join(caption.split())


def test_a_caption_file_may_end_in_caption(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", None).with_suffix(".caption").write_text("of kohya's kind")
    assert captions(tmp_path) == ["of kohya's kind"]


def test_the_default_caption_stands_in_for_absent_and_blank_ones_only(tmp_path: Path) -> None:
    for name, text in (("a", None), ("b", " \n"), ("c", "own")):
        picture(tmp_path / f"{name}.png", text)
    assert captions(tmp_path, default_caption="a photo") == ["a photo", "a photo", "own"]


def test_a_missing_caption_names_the_pictures_and_the_remedy(tmp_path: Path) -> None:
    for number in range(7):
        picture(tmp_path / f"{number}.png", None if number else "there")
    error = error_of(lambda: scan(spec(tmp_path)))
    listed = "1.png, 2.png, 3.png, 4.png, 5.png and 1 more"
    assert error.what == f"dataset.folder={tmp_path} holds 7 images but 6 have no caption: {listed}"
    assert error.remedy == 'write 1.txt beside the image, or set dataset.default_caption="a photo in mystyle"'


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a dog", "sks, a dog"),
        ("a dog in [trigger] style, [trigger]", "a dog in sks style, sks"),
        ("sks, a dog", "sks, a dog"),
        ("he asks a dog", "sks, he asks a dog"),
        ("", "sks"),
    ],
)
def test_the_trigger_word_is_in_each_caption(caption: str, expected: str) -> None:
    assert with_trigger(caption, "sks") == expected


@given(WORDS, st.sampled_from(["sks", "my style", "st(yle"]))
def test_adding_the_trigger_word_twice_is_adding_it_once(caption: str, trigger: str) -> None:
    once = with_trigger(caption, trigger)
    assert trigger in once
    assert with_trigger(once, trigger) == once


def test_a_trigger_mark_without_a_trigger_word_is_an_error(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", "in [trigger] style")
    error = error_of(lambda: scan(spec(tmp_path)))
    assert "dataset.trigger_word is not set: a.png" in error.what


# --- folders that cannot be trained on


def test_a_missing_folder_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "holidays").mkdir()
    error = error_of(lambda: scan(spec(tmp_path / "holiday")))
    assert error.what == f"dataset.folder={tmp_path / 'holiday'} does not exist"
    assert error.remedy == "did you mean holidays?"


def test_a_file_in_place_of_the_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "pictures.zip").touch()
    assert "is a file, not a folder" in error_of(lambda: scan(spec(tmp_path / "pictures.zip"))).what


def test_a_folder_without_pictures_says_what_is_there(tmp_path: Path) -> None:
    for name in ("a.heic", "b.heic", "c.txt"):
        (tmp_path / name).touch()
    error = error_of(lambda: scan(spec(tmp_path)))
    assert error.what == f"dataset.folder={tmp_path} holds no pictures, only 2 .heic, 1 .txt"


def test_an_empty_folder_is_said_to_be_empty(tmp_path: Path) -> None:
    assert error_of(lambda: scan(spec(tmp_path))).what.endswith("holds no pictures: it is empty")


@pytest.mark.parametrize(
    "options", [{"resolution": 8}, {"holdout": 1.0}, {"holdout": -0.1}, {"max_pixels": 0}], ids=lambda o: str(min(o))
)
def test_a_value_out_of_range_names_its_option(options: dict[str, Any]) -> None:
    error = error_of(lambda: check(DatasetSpec(folder="x", **options), "dataset."))
    assert error.what.startswith(f"dataset.{min(options)}={min(options.values())} is out of range")


# --- pictures that cannot be read


def png_of(width: int, height: int) -> bytes:
    """A PNG that only claims its size: decoding it would fail, its header is whole."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a picture, whatever its name says"),
        (b"<html>404</html>", "not a picture, whatever its name says"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture, whatever its name says"),
        (png_of(9000, 9000), "9000 x 9000 is more than dataset.max_pixels=64000000"),
        (png_of(8000, 8000), "image file is truncated"),
    ],
)
def test_an_unreadable_picture_is_skipped_with_its_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    picture(tmp_path / "good.png")
    picture(tmp_path / "bad.png").write_bytes(content)
    found = scan(spec(tmp_path))
    assert [record.path.name for record in found.records] == ["good.png"]
    ((name, said),) = found.skipped
    assert name == "bad.png"
    assert said.startswith(reason)


def test_a_truncated_jpeg_is_skipped(tmp_path: Path) -> None:
    picture(tmp_path / "good.png")
    path = picture(tmp_path / "cut.jpg", size=(64, 64))
    path.write_bytes(path.read_bytes()[:-20])
    assert [name for name, _ in scan(spec(tmp_path)).skipped] == ["cut.jpg"]


def test_a_folder_of_unreadable_pictures_is_an_error_with_reasons(tmp_path: Path) -> None:
    picture(tmp_path / "a.png").write_bytes(b"no")
    error = error_of(lambda: scan(spec(tmp_path)))
    assert error.what.endswith("1 images but none can be read: a.png (not a picture, whatever its name says)")


def test_mutated_pictures_raise_the_named_exceptions_only(tmp_path: Path) -> None:
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
            with suppress(*UNREADABLE):
                assert open_rgb(path, max_pixels=1_000_000).mode == "RGB"


# --- validation


def test_the_validation_folder_is_the_validation_set(tmp_path: Path) -> None:
    for name in ("a", "b", "validation/c"):
        picture(tmp_path / f"{name}.png", f"of {name}")
    training, validation = scan_validation(spec(tmp_path), scan(spec(tmp_path)), seed=0)
    assert [record.caption for record in training] == ["of a", "of b"]
    assert [record.caption for record in validation] == ["of validation/c"]


def test_a_broken_picture_in_the_validation_folder_is_an_error(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "validation/good.png")
    picture(tmp_path / "validation/bad.png").write_bytes(b"no")
    error = error_of(lambda: scan_validation(spec(tmp_path), scan(spec(tmp_path)), seed=0))
    assert "validation has unreadable pictures: bad.png (not a picture" in error.what


def test_a_caption_missing_in_the_validation_folder_names_that_folder(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "validation/b.png", None)
    error = error_of(lambda: scan_validation(spec(tmp_path), scan(spec(tmp_path)), seed=0))
    assert error.what.startswith(f"dataset.folder={tmp_path}/validation holds 1 images but 1 have no caption")


def made_up(count: int) -> list[Record]:
    return [Record(Path(f"{number:03}.png"), "", 8, 8, f"digest {number}") for number in range(count)]


@pytest.mark.parametrize(
    ("count", "part", "held"),
    [(30, 0.1, 3), (8, 0.01, 1), (8, 0.0, 0), (7, 0.01, 0), (1, 0.9, 0), (2, 0.9, 1), (0, 0.5, 0)],
)
def test_the_number_held_out_follows_the_rule(count: int, part: float, held: int) -> None:
    training, validation = hold_out(made_up(count), part, seed=0)
    assert (len(training), len(validation)) == (count - held, held)


@given(st.integers(0, 40), st.floats(0, 0.9), st.integers(0, 2**32))
def test_each_picture_is_either_trained_or_validated(count: int, part: float, seed: int) -> None:
    training, validation = hold_out(made_up(count), part, seed)
    assert sorted(training + validation, key=lambda record: record.path) == made_up(count)


def test_the_choice_depends_on_content_and_not_on_names_or_order() -> None:
    renamed = [replace(record, path=Path(f"{99 - n}.png")) for n, record in enumerate(made_up(30))]
    chosen = {record.digest for record in hold_out(made_up(30), 0.2, seed=3)[1]}
    assert {record.digest for record in hold_out(renamed[::-1], 0.2, seed=3)[1]} == chosen


def test_another_seed_holds_out_other_pictures() -> None:
    assert len({hold_out(made_up(30), 0.2, seed)[1] for seed in range(10)}) == 10


# --- pixels


@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_exif_orientation_is_undone(tmp_path: Path, orientation: int) -> None:
    upright = Image.fromarray(np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation -> the Transpose that a camera would have applied
    seen = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    seen.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(open_rgb(tmp_path / "a.png")), np.asarray(upright))


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16)).save(tmp_path / "a.png")
    assert np.asarray(open_rgb(tmp_path / "a.png"))[0].tolist() == [[0] * 3, [100] * 3, [255] * 3]


def test_a_dark_sixteen_bit_picture_stays_dark(tmp_path: Path) -> None:
    Image.fromarray(np.full((2, 2), 200, dtype=np.uint16)).save(tmp_path / "a.png")
    assert pixel(tmp_path / "a.png") == (1, 1, 1)


def test_floats_from_zero_to_one_are_scaled(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 0.2, 1]], dtype=np.float32)).save(tmp_path / "a.tiff")
    assert np.asarray(open_rgb(tmp_path / "a.tiff"))[0, :, 0].tolist() == [0, 51, 255]


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
    picture(tmp_path / "good.png")
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    picture(tmp_path / "bad.png", icc_profile=lab)
    assert scan(spec(tmp_path)).skipped == (("bad.png", "its colour profile is for Lab, its pixels are RGB"),)


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
