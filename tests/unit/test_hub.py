"""Datasets in the hub's forms, read by `datasets` from folders on the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flux2_lora.dataset import DatasetSpec, Record
from flux2_lora.dataset.hub import fetch_hub
from flux2_lora.dataset.spec import bundled_folder
from tests.sets import error_of, picture, scanned


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parquet(folder: Path, split: str = "train", column: str = "text", count: int = 3) -> Path:
    """A dataset as the hub's viewer makes it: pictures inside a parquet file."""
    import datasets

    rows: dict[str, Any] = {"image": [], column: []}
    for number in range(count):
        file = picture(folder.parent / f"raw/{number}.png", None, colour=(40 * number, 0, 0))
        rows["image"].append({"bytes": file.read_bytes(), "path": None})
        rows[column].append(f"picture {number}")
    features = datasets.Features({"image": datasets.Image(), column: datasets.Value("string")})
    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(rows, features).to_parquet(folder / f"{split}.parquet")
    return folder


def seen(place: Path, **options: Any) -> tuple[Record, ...]:
    spec = DatasetSpec(folder=bundled_folder(), hub=str(place), resolution=[64], holdout=0, **options)
    return scanned(spec).training


def test_pictures_and_captions_come_from_a_parquet_file(here: Path) -> None:
    found = seen(parquet(here / "set"))
    assert [record.caption for record in found] == ["picture 0", "picture 1", "picture 2"]
    assert [record.path.read_bytes() for record in found] == [
        (here / f"raw/{number}.png").read_bytes() for number in range(3)
    ]


def test_a_split_is_chosen(here: Path) -> None:
    parquet(here / "set", "train", count=3)
    parquet(here / "set", "test", count=2)
    assert len(seen(here / "set", split="test")) == 2


def test_an_imagefolder_is_read(here: Path) -> None:
    picture(here / "set/train/a.png", None)
    (here / "set/train/metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "told"}))
    assert [record.caption for record in seen(here / "set")] == ["told"]


def test_a_caption_column_is_chosen(here: Path) -> None:
    parquet(here / "set", column="blip")
    assert seen(here / "set", default_caption="x")[0].caption == "x"
    assert seen(here / "set", caption_column="blip")[0].caption == "picture 0"


def test_what_was_fetched_is_not_written_again(here: Path) -> None:
    parquet(here / "set")
    folder = fetch_hub(str(here / "set"), "train", here / "cache", None)
    before = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.png")}
    fetch_hub(str(here / "set"), "train", here / "cache", None)
    assert {file.name: file.stat().st_mtime_ns for file in folder.glob("*.png")} == before


def test_a_picture_that_left_the_dataset_leaves_the_folder(here: Path) -> None:
    parquet(here / "set", count=3)
    folder = fetch_hub(str(here / "set"), "train", here / "cache", None)
    parquet(here / "set", count=2)
    assert fetch_hub(str(here / "set"), "train", here / "cache", None) == folder
    assert len(list(folder.glob("*.png"))) == 2


def test_nothing_is_written_beside_the_cache(here: Path) -> None:
    parquet(here / "set")
    before = {path for path in here.rglob("*") if "cache" not in path.parts}
    seen(here / "set")
    assert {path for path in here.rglob("*") if "cache" not in path.parts} == before


@pytest.mark.parametrize("suffix", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "AVIF"])
def test_files_get_the_suffix_of_their_content(here: Path, suffix: str) -> None:
    from flux2_lora.dataset.hub import _suffix
    from flux2_lora.dataset.pictures import SUFFIXES

    Image.new("RGB", (8, 8)).save(here / "a", suffix)
    found = _suffix((here / "a").read_bytes())
    assert found in SUFFIXES
    assert found[1:3] == suffix.lower().replace("jpeg", "jpg")[:2]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"split": "nothing"}, "(split nothing) cannot be loaded: "),
        ({"caption_column": "blip"}, "has no column blip"),
    ],
)
def test_what_the_dataset_lacks_is_named(here: Path, options: dict[str, str], what: str) -> None:
    parquet(here / "set")
    assert what in error_of(lambda: seen(here / "set", **options)).what


def test_a_dataset_without_pictures_says_its_columns(here: Path) -> None:
    (here / "set").mkdir()
    (here / "set/train.jsonl").write_text('{"text": "x", "label": 1}\n')
    assert "has no column of pictures, only text, label" in error_of(lambda: seen(here / "set")).what


def test_an_unknown_dataset_is_one_line(here: Path) -> None:
    assert error_of(lambda: seen(Path("nobody/nothing"))).what.startswith("dataset.hub=nobody/nothing (split train)")


def test_a_table_cannot_name_files_outside(here: Path) -> None:
    import datasets

    secret = picture(here / "secret.png", None)
    features = datasets.Features({"image": datasets.Image(decode=False), "text": datasets.Value("string")})
    rows = {"image": [{"bytes": None, "path": str(secret)}], "text": ["x"]}
    (here / "set").mkdir()
    datasets.Dataset.from_dict(rows, features).to_parquet(here / "set/train.parquet")
    error_of(lambda: seen(here / "set"))
    cached = list((here / "cache/hub").rglob("*.png"))
    assert all(path.read_bytes() != secret.read_bytes() for path in cached)
