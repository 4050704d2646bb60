"""What `scan` makes of the folders that people have."""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flux2_lora.dataset import DatasetSpec, Record, preview_prompts
from flux2_lora.dataset.pictures import UnreadableError
from flux2_lora.dataset.scan import hold_out
from flux2_lora.dataset.seen import Memory
from flux2_lora.dataset.spec import SourceSpec, bundled_folder, resolved
from flux2_lora.options import check
from tests.sets import error_of, names, picture, records, scanned, skipped, spec

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
    picture(tmp_path / "a.jpg", size=(90, 60), exif=exif)
    picture(tmp_path / "b.jpg", size=(90, 60), exif=exif)
    first, second = records(tmp_path)
    assert (first.width, first.height) == (60, 90)
    assert first.digest == second.digest


def test_a_new_date_leaves_the_digest_and_new_content_changes_it(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    before = records(tmp_path)
    path.touch()
    assert records(tmp_path) == before
    picture(path, colour="blue")
    assert records(tmp_path)[0].digest != before[0].digest


# --- folders that cannot be trained on


def test_a_missing_folder_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "holidays").mkdir()
    error = error_of(lambda: scanned(spec(tmp_path / "holiday")))
    assert error.what == f"dataset.folder={tmp_path / 'holiday'} does not exist"
    assert error.remedy == "did you mean holidays?"


def test_a_file_in_place_of_the_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "pictures.zip").touch()
    assert "is a file, not a folder" in error_of(lambda: scanned(spec(tmp_path / "pictures.zip"))).what


def test_a_folder_without_pictures_says_what_is_there(tmp_path: Path) -> None:
    for name in ("a.zip", "b.zip", "c.txt"):
        (tmp_path / name).touch()
    error = error_of(lambda: scanned(spec(tmp_path)))
    assert error.what == f"dataset.folder={tmp_path} holds no pictures, only 2 .zip, 1 .txt"


def test_an_empty_folder_is_said_to_be_empty(tmp_path: Path) -> None:
    assert error_of(lambda: scanned(spec(tmp_path))).what.endswith("holds no pictures: it is empty")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"resolution": [8]}, "dataset.resolution=8 is out of range"),
        ({"resolution": [512, 8]}, "dataset.resolution[1]=8 is out of range"),
        ({"holdout": 1.0}, "dataset.holdout=1.0 is out of range"),
        ({"holdout": -0.1}, "dataset.holdout=-0.1 is out of range"),
        ({"max_pixels": 0}, "dataset.max_pixels=0 is out of range"),
        ({"crop": "middle"}, "dataset.crop=middle is not a choice"),
        ({"sources": [SourceSpec(folder="a"), SourceSpec(folder="b", repeats=0)]}, "dataset.sources[1].repeats=0"),
    ],
)
def test_a_value_out_of_range_names_its_option(options: dict[str, Any], what: str) -> None:
    error = error_of(lambda: check(DatasetSpec(folder="x", **options), "dataset."))
    assert error.what.startswith(what)


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
    found = scanned(spec(tmp_path))
    assert [record.path.name for record in found.training] == ["good.png"]
    ((name, said),) = found.skipped
    assert name == "bad.png"
    assert said.startswith(reason)


def test_a_truncated_jpeg_is_skipped(tmp_path: Path) -> None:
    picture(tmp_path / "good.png")
    path = picture(tmp_path / "cut.jpg", size=(64, 64))
    path.write_bytes(path.read_bytes()[:-20])
    assert [name for name, _ in scanned(spec(tmp_path)).skipped] == ["cut.jpg"]


def test_a_folder_of_unreadable_pictures_is_an_error_with_reasons(tmp_path: Path) -> None:
    picture(tmp_path / "a.png").write_bytes(b"no")
    error = error_of(lambda: scanned(spec(tmp_path)))
    assert error.what.endswith("1 images but none can be used: a.png (not a picture, whatever its name says)")


# --- validation


def test_the_validation_folder_is_the_validation_set(tmp_path: Path) -> None:
    for name in ("a", "b", "validation/c"):
        picture(tmp_path / f"{name}.png", f"of {name}")
    found = scanned(spec(tmp_path))
    training, validation = found.training, found.validation
    assert [record.caption for record in training] == ["of a", "of b"]
    assert [record.caption for record in validation] == ["of validation/c"]


def test_a_broken_picture_in_the_validation_folder_is_an_error(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "validation/good.png")
    picture(tmp_path / "validation/bad.png").write_bytes(b"no")
    error = error_of(lambda: scanned(spec(tmp_path)))
    assert "validation has unreadable pictures: validation/bad.png (not a picture" in error.what


def test_a_caption_missing_in_the_validation_folder_names_that_folder(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "validation/b.png", None)
    error = error_of(lambda: scanned(spec(tmp_path)))
    assert error.what.startswith(f"dataset.folder={tmp_path}/validation holds 1 images but 1 have no caption")


def made_up(count: int) -> list[Record]:
    source = resolved(spec(Path()), SourceSpec(folder=""), Path(), "")
    names = [f"{number:03}.png" for number in range(count)]
    return [Record(Path(n), n, f"digest {n}", 8, 8, ("",), ((64, 64),), 1, source) for n in names]


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
    assert sorted([*training, *validation], key=lambda record: record.path) == made_up(count)


def test_the_choice_depends_on_content_and_not_on_names_or_order() -> None:
    renamed = [replace(record, path=Path(f"{99 - n}.png")) for n, record in enumerate(made_up(30))]
    chosen = {record.digest for record in hold_out(made_up(30), 0.2, seed=3)[1]}
    assert {record.digest for record in hold_out(renamed[::-1], 0.2, seed=3)[1]} == chosen


def test_another_seed_holds_out_other_pictures() -> None:
    assert len({tuple(hold_out(made_up(30), 0.2, seed)[1]) for seed in range(10)}) == 10


def test_copies_of_a_picture_are_held_out_together() -> None:
    copied = [replace(record, path=Path(f"copy-{record.path}")) for record in made_up(10)]
    training, validation = hold_out([*made_up(10), *copied], 0.3, seed=0)
    assert len(validation) == 6
    assert not {record.digest for record in training} & {record.digest for record in validation}


def test_a_validation_folder_elsewhere_is_held_out_besides_the_one_within(tmp_path: Path) -> None:
    picture(tmp_path / "a/a.png", "of a")
    picture(tmp_path / "a/validation/b.png", "of b")
    picture(tmp_path / "c/c.png", "of c")
    found = scanned(spec(tmp_path / "a", validation=str(tmp_path / "c")))
    assert [record.caption for record in found.training] == ["of a"]
    assert [record.caption for record in found.validation] == ["of b", "of c"]


def test_a_validation_folder_within_is_not_trained_on(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", "of a")
    picture(tmp_path / "held/b.png", "of b")
    found = scanned(spec(tmp_path, validation=str(tmp_path / "held")))
    assert [record.caption for record in found.training] == ["of a"]


# --- several sources


def test_sources_have_their_own_repeats_weights_and_trigger_words(tmp_path: Path) -> None:
    picture(tmp_path / "a/1.png", "a cat")
    picture(tmp_path / "b/1.png", "a dog")
    sources = [
        SourceSpec(folder=str(tmp_path / "a"), repeats=3, weight=0.5),
        SourceSpec(folder=str(tmp_path / "b"), trigger_word="bsks", flip=True),
    ]
    first, second = scanned(DatasetSpec(folder=bundled_folder(), sources=sources, trigger_word="sks")).training
    assert (first.name, first.caption, first.repeats, first.source.weight) == ("a/1.png", "sks, a cat", 3, 0.5)
    assert (second.name, second.caption, second.repeats, second.source.weight) == ("b/1.png", "bsks, a dog", 1, 1)
    assert (first.source.flip, second.source.flip) == (False, True)


def test_a_folder_beside_sources_is_a_source_as_well(tmp_path: Path) -> None:
    picture(tmp_path / "a/1.png")
    picture(tmp_path / "b/2.png")
    assert names(tmp_path / "a", sources=[SourceSpec(folder=str(tmp_path / "b"))]) == ["a/1.png", "b/2.png"]


def test_pictures_for_regularisation_get_no_trigger_word_and_are_not_held_out(tmp_path: Path) -> None:
    for number in range(10):
        picture(tmp_path / f"mine/{number}.png", "a cat", colour=(number, 0, 0))
        picture(tmp_path / f"class/{number}.png", "any cat", colour=(0, number, 9))
    options = {"regularisation": str(tmp_path / "class"), "regularisation_weight": 0.3}
    found = scanned(spec(tmp_path / "mine", trigger_word="sks", holdout=0.5, **options))
    general = [record for record in found.training if record.source.regularisation]
    assert (len(found.training), len(found.validation), len(general)) == (15, 5, 10)
    assert {record.caption for record in general} == {"any cat"}
    assert {record.source.weight for record in general} == {0.3}


@pytest.mark.parametrize(("source", "which"), [(SourceSpec(), "neither"), (SourceSpec(folder="a", hub="b"), "both")])
def test_a_source_names_a_folder_or_a_hub_dataset(source: SourceSpec, which: str) -> None:
    error = error_of(lambda: scanned(DatasetSpec(folder="x", sources=[source])))
    assert error.what == f"dataset.sources[0] names {which} of folder and hub"


def test_a_picture_is_trained_at_each_resolution_once(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", size=(300, 300))
    picture(tmp_path / "b.png", size=(40, 40))
    large, small = records(tmp_path, resolution=[64, 128, 256])
    assert large.buckets == ((64, 64), (128, 128), (256, 256))
    assert small.buckets == ((48, 48),)  # 64 px would enlarge it 1.6 times


def test_a_picture_too_small_for_one_step_is_named(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", size=(10, 400))
    assert skipped(tmp_path) == {"b.png": "10 x 400 px is too small; dataset.max_upscale=1.5 is the limit"}


def test_animations_are_said_once(tmp_path: Path) -> None:
    for name in ("a.gif", "b.gif"):
        frames = [Image.new("RGB", (80, 80), colour) for colour in ("red", "blue")]
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        (tmp_path / name).with_suffix(".txt").write_text("x")
    assert scanned(spec(tmp_path)).notes == ("2 of several frames or pages, the first is used: a.gif, b.gif",)


# --- what is told


def test_the_first_five_offenders_are_told_and_all_are_written(tmp_path: Path) -> None:
    picture(tmp_path / "p/good.png")
    for number in range(7):
        picture(tmp_path / f"p/{number}.png").write_bytes(b"no")
    lines = scanned(spec(tmp_path / "p")).report(tmp_path / "out/skipped.txt")
    assert lines[:5] == [f"skipped {n}.png: not a picture, whatever its name says" for n in range(5)]
    assert lines[5] == f"7 skipped in all, the full list is in {tmp_path}/out/skipped.txt"
    written = (tmp_path / "out/skipped.txt").read_text().splitlines()
    assert written == [f"{n}.png: not a picture, whatever its name says" for n in range(7)]


def test_nothing_skipped_writes_nothing(tmp_path: Path) -> None:
    picture(tmp_path / "p/good.png")
    assert scanned(spec(tmp_path / "p")).report(tmp_path / "skipped.txt") == []
    assert not (tmp_path / "skipped.txt").exists()


def test_where_nothing_is_left_the_full_list_of_many_is_written(tmp_path: Path) -> None:
    for number in range(7):
        picture(tmp_path / f"p/{number}.png").write_bytes(b"no")
    error = error_of(lambda: scanned(spec(tmp_path / "p")))
    assert "4.png (not a picture, whatever its name says) and 2 more" in error.what
    assert error.what.endswith(f"the full list is in {tmp_path}/skipped.txt")
    assert len((tmp_path / "skipped.txt").read_text().splitlines()) == 7


# --- what is remembered


def test_a_known_content_is_not_decoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "p/a.png")
    memory = Memory(tmp_path / "pictures.json")
    first = memory.look(tmp_path / "p/a.png", max_pixels=10**6)
    memory.save()
    (tmp_path / "p/a.png").rename(tmp_path / "p/renamed.png")
    monkeypatch.setattr("flux2_lora.dataset.seen.open_picture", None)
    assert Memory(tmp_path / "pictures.json").look(tmp_path / "p/renamed.png", max_pixels=10**6) == first


def test_a_replaced_picture_of_the_same_name_size_and_date_is_decoded_again(tmp_path: Path) -> None:
    path = picture(tmp_path / "p/a.bmp", size=(40, 20))
    memory = Memory(tmp_path / "pictures.json")
    before, state = memory.look(path, max_pixels=10**6), path.stat()
    memory.save()
    picture(path, size=(20, 40))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    after = Memory(tmp_path / "pictures.json").look(path, max_pixels=10**6)
    assert (before.width, after.width) == (40, 20)


def test_a_lower_limit_of_pixels_holds_for_what_is_remembered(tmp_path: Path) -> None:
    path, memory = picture(tmp_path / "a.png"), Memory(tmp_path / "pictures.json")
    memory.look(path, max_pixels=10**6)
    with pytest.raises(UnreadableError, match=r"more than dataset.max_pixels=100"):
        memory.look(path, max_pixels=100)


def test_any_flipped_bit_of_the_memory_is_found(tmp_path: Path) -> None:
    path, file = picture(tmp_path / "a.png"), tmp_path / "pictures.json"
    memory = Memory(file)
    seen = memory.look(path, max_pixels=10**6)
    memory.save()
    whole = file.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 7
        file.write_bytes(damaged)
        assert Memory(file).look(path, max_pixels=10**6) == seen


def test_nothing_is_remembered_before_it_is_saved(tmp_path: Path) -> None:
    picture(tmp_path / "p/a.png")
    scanned(spec(tmp_path / "p"))
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_a_list_of_an_earlier_run_goes_where_nothing_is_skipped(tmp_path: Path) -> None:
    picture(tmp_path / "p/good.png")
    (tmp_path / "skipped.txt").write_text("an old one")
    scanned(spec(tmp_path / "p")).report(tmp_path / "skipped.txt")
    assert not (tmp_path / "skipped.txt").exists()


def test_one_folder_at_two_resolutions_has_one_validation_set(tmp_path: Path) -> None:
    picture(tmp_path / "p/a.png")
    picture(tmp_path / "p/validation/b.png")
    found = scanned(spec(tmp_path / "p", sources=[SourceSpec(folder=str(tmp_path / "p"), resolution=[48])]))
    assert [record.buckets for record in found.training] == [((64, 64),), ((48, 48),)]
    assert len(found.validation) == 1


def test_preview_prompts_are_lines_without_comments_and_with_the_trigger_word(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("a [trigger] cat\r\n\n# no\n un \x1bchat\n".encode("utf-16"))
    assert preview_prompts(spec(tmp_path, trigger_word="sks")) == ["a sks cat", "un chat"]


def test_a_home_of_nobody_is_one_line() -> None:
    assert "cannot be opened" in error_of(lambda: scanned(spec(Path("~nobody-here/pictures")))).what


def test_a_picture_of_the_validation_folder_is_not_trained_on_under_any_name(tmp_path: Path) -> None:
    picture(tmp_path / "p/a.png")
    picture(tmp_path / "p/copy.png", colour="blue")
    picture(tmp_path / "p/validation/b.png", colour="blue")
    found = scanned(spec(tmp_path / "p"))
    assert [record.name for record in found.training] == ["a.png"]
    assert found.notes == ("1 not trained on, being held out for validation as well: copy.png",)


def test_a_validation_set_that_is_the_training_set_is_said(tmp_path: Path) -> None:
    picture(tmp_path / "p/a.png")
    found = scanned(spec(tmp_path / "p", validation=str(tmp_path / "p")))
    assert found.notes == ("every picture is validated with as well: the validation loss says nothing here",)


def test_pictures_for_regularisation_are_no_training_set(tmp_path: Path) -> None:
    picture(tmp_path / "mine/a.png").write_bytes(b"no")
    picture(tmp_path / "class/a.png")
    error = error_of(lambda: scanned(spec(tmp_path / "mine", regularisation=str(tmp_path / "class"))))
    assert "none can be used" in error.what


def test_the_default_caption_is_not_for_regularisation(tmp_path: Path) -> None:
    picture(tmp_path / "mine/a.png", None)
    picture(tmp_path / "class/a.png", None)
    options = {"regularisation": str(tmp_path / "class"), "default_caption": "in mystyle"}
    assert "1 have no caption" in error_of(lambda: scanned(spec(tmp_path / "mine", **options))).what


def test_each_source_is_asked_for_its_own_trigger_word(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", "a [trigger] cat")
    sources = [SourceSpec(folder=str(tmp_path), trigger_word="sks"), SourceSpec(folder=str(tmp_path))]
    error = error_of(lambda: scanned(DatasetSpec(folder=bundled_folder(), sources=sources)))
    assert "dataset.trigger_word is not set" in error.what


def test_a_linked_validation_folder_is_not_read(tmp_path: Path) -> None:
    picture(tmp_path / "secret/s.png")
    picture(tmp_path / "p/a.png")
    (tmp_path / "p/validation").symlink_to(tmp_path / "secret")
    found = scanned(spec(tmp_path / "p"))
    assert found.validation == ()
    assert [name for name, _ in found.skipped] == ["validation/"]


def test_masks_are_not_the_pictures_themselves(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    error = error_of(lambda: scanned(spec(tmp_path, masks=str(tmp_path))))
    assert error.what.endswith("is the folder of the pictures")


@pytest.mark.parametrize("options", [{"holdout": float("nan")}, {"max_upscale": float("nan")}])
def test_no_limit_is_met_by_what_is_no_number(options: dict[str, Any]) -> None:
    assert "is out of range" in error_of(lambda: check(DatasetSpec(folder="x", **options), "dataset.")).what


def test_many_missing_captions_are_written_to_the_list(tmp_path: Path) -> None:
    for number in range(7):
        picture(tmp_path / f"p/{number}.png", None)
    assert error_of(lambda: scanned(spec(tmp_path / "p"))).what.endswith(f"the full list is in {tmp_path}/skipped.txt")
    assert (tmp_path / "skipped.txt").read_text().splitlines()[6] == "6.png: has no caption"
