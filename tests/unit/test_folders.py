"""What a folder lists, and what it never reads: metadata, repeats, masks, links, hostile paths."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux2_lora.dataset.folders import shown
from tests.sets import captions, error_of, names, picture, records, scanned, skipped, spec


def metadata(folder: Path, *rows: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "metadata.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


# --- metadata of imagefolders


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_captions_stand_in_metadata_lines(tmp_path: Path, column: str) -> None:
    picture(tmp_path / "a.png", None)
    metadata(tmp_path, {"file_name": "a.png", column: "told"})
    assert captions(tmp_path) == ["told"]


def test_captions_stand_in_a_csv_with_a_byte_order_mark(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", None)
    (tmp_path / "metadata.csv").write_bytes('file_name,text\r\na.png,"a cat, asleep"\r\n'.encode("utf-8-sig"))
    assert captions(tmp_path) == ["a cat, asleep"]


def test_captions_stand_in_a_parquet_file(tmp_path: Path) -> None:
    from datasets import Dataset

    picture(tmp_path / "a.png", None)
    Dataset.from_dict({"file_name": ["a.png"], "text": ["told"]}).to_parquet(tmp_path / "metadata.parquet")
    assert captions(tmp_path) == ["told"]


def test_each_folder_may_have_its_own_metadata(tmp_path: Path) -> None:
    for place in ("x", "y"):
        picture(tmp_path / place / "a.png", None)
        metadata(tmp_path / place, {"file_name": "a.png", "text": f"in {place}"})
    assert captions(tmp_path) == ["in x", "in y"]


def test_metadata_may_name_pictures_of_folders_below(tmp_path: Path) -> None:
    picture(tmp_path / "x/a.png", None)
    metadata(tmp_path, {"file_name": "x/a.png", "text": "below"})
    assert captions(tmp_path) == ["below"]


def test_a_list_or_several_rows_are_several_captions(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", None)
    metadata(tmp_path, {"file_name": "a.png", "text": ["one", "two"]}, {"file_name": "a.png", "text": "three"})
    assert records(tmp_path)[0].texts == ("one", "two", "three")


def test_a_column_may_be_chosen(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", None)
    metadata(tmp_path, {"file_name": "a.png", "text": "long", "tags": "short"})
    assert captions(tmp_path, caption_column="tags") == ["short"]


def test_a_picture_that_metadata_does_not_name_has_its_own_caption(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", None)
    picture(tmp_path / "b.png", "beside")
    metadata(tmp_path, {"file_name": "a.png", "text": "told"})
    assert captions(tmp_path) == ["told", "beside"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"file_name": "gone.png", "text": "x"}, "file_name=gone.png is not there"),
        ({"text": "x"}, "it has no file_name"),
        ({"file_name": 7}, "it has no file_name"),
        (["a.png"], "it has no file_name"),
        ({"file_name": "metadata.jsonl"}, "file_name=metadata.jsonl is no picture"),
        ({"file_name": ""}, "file_name= is not there"),
    ],
)
def test_a_row_that_names_no_picture_is_told_by_its_number(tmp_path: Path, row: Any, reason: str) -> None:
    picture(tmp_path / "a.png")
    metadata(tmp_path, {"file_name": "a.png", "text": "x"}, row)
    assert skipped(tmp_path) == {"metadata.jsonl row 2": reason}


def test_a_line_that_is_no_json_is_told_and_the_others_hold(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", None)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": \n{"file_name": "a.png", "text": "told"}\n' + "[" * 100_000)
    assert captions(tmp_path) == ["told"]
    first, third = skipped(tmp_path).items()
    assert first[0] == "metadata.jsonl row 1"
    assert first[1].startswith("is not JSON: Expecting value")
    assert third[1].startswith("is not JSON")


def test_a_parquet_file_that_is_none_is_told(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 no PAR1")
    assert skipped(tmp_path)["metadata.parquet"].startswith("cannot be read: ")


# --- kohya's folders


def test_the_number_before_a_folders_name_is_its_repeats(tmp_path: Path) -> None:
    picture(tmp_path / "10_sks cat/a.png")
    picture(tmp_path / "3_deep/inner/b.png")
    picture(tmp_path / "plain/c.png")
    assert [record.repeats for record in records(tmp_path)] == [10, 3, 1]


def test_repeats_of_the_source_and_of_the_folder_are_multiplied(tmp_path: Path) -> None:
    picture(tmp_path / "10_cat/a.png")
    (record,) = records(tmp_path / "10_cat")
    assert record.repeats == 10


def test_the_folders_name_stands_in_for_a_caption(tmp_path: Path) -> None:
    picture(tmp_path / "10_sks cat/a.png", None)
    picture(tmp_path / "10_sks cat/b.png", "own")
    assert captions(tmp_path) == ["sks cat", "own"]
    assert captions(tmp_path, default_caption="a photo") == ["a photo", "own"]


def test_a_year_before_a_folders_name_is_no_number_of_repeats(tmp_path: Path) -> None:
    picture(tmp_path / "2024_summer/a.png")
    assert records(tmp_path)[0].repeats == 1


def test_a_folder_of_no_repeats_is_told(tmp_path: Path) -> None:
    picture(tmp_path / "0_off/a.png")
    picture(tmp_path / "1_on/a.png")
    assert skipped(tmp_path) == {"0_off/a.png": "its folder's name says 0 repeats"}


# --- files that are not read


@pytest.mark.parametrize("suffix", [".jxl", ".psd", ".CR2", ".mp4"])
def test_pictures_and_films_of_other_formats_are_named(tmp_path: Path, suffix: str) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / f"b{suffix}").write_bytes(b"x")
    reason = "a film" if suffix == ".mp4" else f"{suffix[1:].lower()} is not read; save it as PNG or JPEG"
    assert skipped(tmp_path) == {f"b{suffix}": reason}


def test_heic_without_its_library_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "b.heic").write_bytes(b"x")
    monkeypatch.setattr("flux2_lora.dataset.folders.heic_is_read", lambda: False)
    assert skipped(tmp_path) == {"b.heic": "HEIC needs pillow-heif: install flux2-lora[heic]"}


def test_an_unreadable_caption_is_a_reason(tmp_path: Path) -> None:
    picture(tmp_path / "good.png")
    picture(tmp_path / "a.png").with_suffix(".txt").chmod(0)
    if os.access(tmp_path / "a.txt", os.R_OK):
        pytest.skip("this user may read everything")
    assert skipped(tmp_path) == {"a.png": "its caption a.txt cannot be read: Permission denied"}


# --- masks


def test_a_mask_lies_beside_its_picture(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    picture(tmp_path / "a-masklabel.png", None, colour="white")
    (record,) = records(tmp_path)
    assert record.mask is not None
    assert record.mask.path == tmp_path / "a-masklabel.png"


def test_masks_may_have_a_folder_of_their_own(tmp_path: Path) -> None:
    picture(tmp_path / "set/x/a.jpg")
    picture(tmp_path / "set/b.jpg")
    picture(tmp_path / "masks/x/a.png", None, colour="white")
    found = scanned(spec(tmp_path / "set", masks=str(tmp_path / "masks")))
    assert [record.mask is not None for record in found.training] == [False, True]
    assert found.notes == ("1 without a mask in dataset.masks, trained as a whole: b.jpg",)


def test_a_folder_of_masks_within_the_pictures_is_not_trained_on(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    picture(tmp_path / "masks/a.png", None, colour="white")
    assert names(tmp_path, masks=str(tmp_path / "masks")) == ["a.jpg"]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"colour": "black"}, "its mask is black everywhere"),
        ({"colour": "white", "size": (64, 80)}, "its mask is 64 x 80, the picture 80 x 64"),
    ],
)
def test_a_mask_that_cannot_be_meant_is_told(tmp_path: Path, how: dict[str, Any], reason: str) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    picture(tmp_path / "b-masklabel.png", None, **how)
    assert skipped(tmp_path) == {"b.png": reason}


def test_a_broken_mask_is_told(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    (tmp_path / "b-masklabel.png").write_bytes(b"no")
    assert skipped(tmp_path) == {"b.png": "its mask cannot be read: not a picture, whatever its name says"}


def test_a_smaller_mask_of_the_same_shape_is_taken(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", size=(803, 601))
    picture(tmp_path / "a-masklabel.png", None, colour="white", size=(100, 75))
    assert records(tmp_path)[0].mask is not None


# --- links


def test_links_within_the_folder_are_followed(tmp_path: Path) -> None:
    real = picture(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(real)
    (tmp_path / "b.txt").write_text("x")
    assert names(tmp_path) == ["a.png", "b.png"]


def test_links_out_of_the_folder_are_followed_on_request(tmp_path: Path) -> None:
    picture(tmp_path / "set/a.png")
    outside = picture(tmp_path / "out/b.png").parent
    (tmp_path / "set/b.png").symlink_to(outside / "b.png")
    (tmp_path / "set/b.txt").write_text("x")
    (tmp_path / "set/c").symlink_to(outside)
    assert skipped(tmp_path / "set") == {
        "b.png": "links out of the folder; dataset.follow_links=true allows that",
        "c/": "a link to a folder; dataset.follow_links=true follows it",
    }
    assert names(tmp_path / "set", follow_links=True) == ["a.png", "b.png", "c/b.png"]


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    picture(tmp_path / "real/a.png")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert names(tmp_path / "link") == ["a.png"]


def test_a_link_to_a_folder_above_ends(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert names(tmp_path, follow_links=True) == ["a.png"]


def test_a_link_that_leads_nowhere_is_told(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    assert skipped(tmp_path) == {"b.png": "is no file, or a link that leads nowhere"}


# --- hostile paths

SECRET = "the secret"
HOSTILE = [
    *(
        "../secret.png",
        "../../secret.png",
        "x/../../secret.png",
        "./../secret.png",
        "..",
        "x/..",
        "../set/../secret.png",
    ),
    *("..\\secret.png", "x\\..\\..\\secret.png", "..\\..\\..\\..\\secret.png", "x/..\\../secret.png"),
    *("{root}/secret.png", "{root}/set/../secret.png", "{root}/set/a.png", "//{root}/secret.png", "/etc/passwd"),
    *("/dev/zero", "/proc/self/environ", "C:\\secret.png", "C:/secret.png", "C:secret.png", "\\\\host\\share\\a.png"),
    *("\\secret.png", "//host/share/a.png", "~/secret.png", "~root/secret.png", "~", "file:///etc/passwd"),
    *("a.png\n", "\na.png", "a\n.png", "a.png\r", "a\x00.png", "\x1b[2Ja.png", "a.png\u2028", "a.png\u202e"),
    *("out.png", "outer/secret.png", "x/out.png", "loop.png", "fifo.png", "a.png/b.png", "a.png/../../secret.png"),
    *("x" * 300 + ".png", "x/" * 3000 + "a.png", "", ".", "/", "\\", " ", "...", "....//secret.png", "con.png"),
    *("%2e%2e/secret.png", "$HOME/secret.png", "`id`.png", "a.png; rm -rf /", "*", "http://host/a.png", "\ud800.png"),
]


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A set with one good picture, beside a secret that links, and no file but them, would reach."""
    picture(tmp_path / "secret.png", SECRET)
    picture(tmp_path / "set/a.png", "the good one")
    (tmp_path / "set/x").mkdir()
    (tmp_path / "set/out.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "set/x/out.png").symlink_to("../../secret.png")
    (tmp_path / "set/outer").symlink_to(tmp_path)
    (tmp_path / "set/loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "set/fifo.png")
    return tmp_path


def state_of(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*")}


def test_there_are_fifty_hostile_paths_and_more() -> None:
    assert len(set(HOSTILE)) >= 50


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_path_in_metadata_is_refused(trap: Path, text: str) -> None:
    hostile = text.replace("{root}", str(trap))
    metadata(trap / "set", {"file_name": hostile, "text": SECRET}, {"file_name": "a.png", "text": "told"})
    before = state_of(trap)
    found = scanned(spec(trap / "set"))
    assert state_of(trap) == before
    assert [(record.name, record.texts) for record in found.training] == [("a.png", ("told",))]
    reasons = dict(found.skipped)
    assert "metadata.jsonl row 1" in reasons
    assert all(shown(reason) == reason for reason in reasons.values())


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_path_in_a_caption_is_a_text_and_no_path(trap: Path, text: str) -> None:
    (trap / "set/a.txt").write_bytes(("as " + text).encode("utf-8", "surrogatepass"))
    before = state_of(trap)
    (record,) = scanned(spec(trap / "set")).training
    assert state_of(trap) == before
    assert SECRET not in record.caption
    assert "\n" not in record.caption
    assert "\0" not in record.caption


@pytest.mark.parametrize("kind", ["caption", "mask", "metadata"])
def test_what_stands_beside_a_picture_must_not_link_out(trap: Path, kind: str) -> None:
    name = {"caption": "b.txt", "mask": "b-masklabel.png", "metadata": "metadata.jsonl"}[kind]
    picture(trap / "set/b.png", None if kind == "caption" else "x")
    target = metadata(trap, {"file_name": "set/a.png"}) if kind == "metadata" else trap / "secret.txt"
    (trap / "set" / name).symlink_to(target)
    reasons = skipped(trap / "set", default_caption="x")
    where = "metadata.jsonl" if kind == "metadata" else "b.png"
    assert "links out of the folder; dataset.follow_links=true allows that" in reasons[where]


def test_a_picture_whose_name_holds_a_line_break_is_told_on_one_line(tmp_path: Path) -> None:
    picture(tmp_path / "good.png")
    picture(tmp_path / "a\n\x1b[31m.png")
    assert skipped(tmp_path) == {"a\\n\\x1b[31m.png": "its name holds control characters or undecodable bytes"}


def test_a_name_of_undecodable_bytes_is_told(tmp_path: Path) -> None:
    picture(tmp_path / "good.png")
    source = picture(tmp_path / "bad.png")
    source.rename(tmp_path / os.fsdecode(b"\xff\xfe.png"))
    ((name, _),) = skipped(tmp_path).items()
    assert name == "\\udcff\\udcfe.png"


@given(st.text(max_size=40))
def test_a_shown_name_is_one_printable_line(name: str) -> None:
    assert shown(name).isprintable()


def test_a_missing_folder_with_a_hostile_name_is_one_line() -> None:
    error_of(lambda: scanned(spec(Path("no\nwhere\x00"))))


def test_metadata_whose_caption_column_is_not_known_says_which_there_are(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", None)
    metadata(tmp_path, {"file_name": "a.png", "description": "told"})
    error = error_of(lambda: records(tmp_path))
    reason = "metadata.jsonl row 1 has the columns description; dataset.caption_column names that of the captions"
    assert error.what.endswith(f"1 have no caption: a.png; {reason}")
    assert captions(tmp_path, caption_column="description") == ["told"]


def test_a_caption_file_may_be_written_in_capitals(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", None)
    (tmp_path / "a.TXT").write_text("loud")
    assert captions(tmp_path) == ["loud"]


def test_a_name_as_long_as_the_file_system_takes_is_read(tmp_path: Path) -> None:
    picture(tmp_path / f"{'n' * 245}.png", None)
    assert captions(tmp_path, default_caption="x") == ["x"]
