"""Configuration files of other trainers that mean nothing, are broken or hostile: refused in two lines."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flux2_lora.dataset.imports import LARGEST_FILE, read_import
from flux2_lora.errors import UserError
from tests.configurations import AI_TOOLKIT, KOHYA, MUSUBI, Read, dataset, reader, subset


@pytest.fixture
def read(tmp_path: Path) -> Read:
    return reader(tmp_path)


def error_of(action: Callable[[], object]) -> UserError:
    with pytest.raises(UserError) as error:
        action()
    return error.value


def test_a_file_that_repeats_nothing_is_refused(read: Read) -> None:
    assert "repeats every dataset 0 times" in error_of(lambda: read(subset("num_repeats = 0"))).what


@pytest.mark.parametrize(
    "option",
    [
        "num_repeats = 'ten'",
        "num_repeats = 1.5",
        "num_repeats = true",
        "num_repeats = -1",
        "num_repeats = 10000000",
        f"num_repeats = 0x{'f' * 5000}",
        "resolution = 'big'",
        "resolution = 0",
        "resolution = 100000",
        "resolution = [512]",
        "resolution = [512, 512, 512]",
        "resolution = [512, '512']",
        "caption_dropout_rate = 1.5",
        "caption_dropout_rate = nan",
        "caption_dropout_rate = 'often'",
        "caption_dropout_rate = true",
        "keep_tokens = '1'",
        "is_reg = 1",
        "flip_aug = 'yes'",
        "class_tokens = 7",
        "caption_extension = '../secret'",
        "caption_extension = '.'",
        "caption_extension = '.json'",
        "caption_extension = ['.txt']",
    ],
)
def test_a_value_that_means_nothing_is_refused_by_its_key(read: Read, option: str) -> None:
    error = error_of(lambda: read(subset(option)))
    assert f"kohya.toml: datasets[0].subsets[0].{option.partition(' ')[0]}=" in error.what
    assert error.remedy.startswith("write ")
    assert len(error.what.splitlines()) == 1


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan"), "heavy", None, True, [1]])
def test_a_weight_is_a_number_above_0(read: Read, value: Any) -> None:
    text = dataset(loss_multiplier=value).replace("Infinity", ".inf").replace("NaN", ".nan")
    if value is None:
        assert read(text, "job.yaml").sources[0].weight == 1
    else:
        assert "datasets[0].loss_multiplier=" in error_of(lambda: read(text, "job.yaml")).what


def test_a_general_value_is_refused_where_it_stands(read: Read) -> None:
    assert ": general.num_repeats='ten'" in error_of(lambda: read("[general]\nnum_repeats = 'ten'\n" + subset(""))).what


@pytest.mark.parametrize("resolution", [[], "512,768", [512, "768"], [[512, 768]], 8, 512.0])
def test_ai_toolkits_resolution_is_one_or_more_sides(read: Read, resolution: Any) -> None:
    assert ".resolution=" in error_of(lambda: read(dataset(resolution=resolution), "job.yaml")).what


@pytest.mark.parametrize("key", ["metadata_file", "image_jsonl_file"])
def test_captions_in_one_file_are_refused_with_the_way_out(read: Read, key: str) -> None:
    error = error_of(lambda: read(f"[[datasets]]\n{key} = 'all.jsonl'"))
    assert f"datasets[0].{key}=" in error.what
    assert "metadata.jsonl with file_name and text" in error.remedy


def test_a_dataset_path_that_is_a_file_of_captions_is_refused(read: Read) -> None:
    text = dataset(dataset_path="all.json").replace('"folder_path": "/style", ', "")
    assert "metadata.jsonl" in error_of(lambda: read(text, "job.yaml")).remedy


@pytest.mark.parametrize("option", ["video_directory = 'films'", "video_jsonl_file = 'x.jsonl'", "num_frames = 41"])
def test_videos_are_refused(read: Read, option: str) -> None:
    assert "videos cannot be trained" in error_of(lambda: read(subset(option))).remedy


def test_inverted_masks_are_refused(read: Read) -> None:
    error = error_of(lambda: read(dataset(mask_path="/masks", invert_mask=True), "job.yaml"))
    assert "config.process[0].datasets[0].invert_mask=true" in error.what


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("a.toml", "", "names no dataset"),
        ("a.toml", "[general]\nresolution = 512", "names no dataset"),
        ("a.toml", "[[datasets]]\nresolution = 512", "datasets[0] names no folder"),
        ("a.toml", "[[datasets]]\nimage_directory = ''", "datasets[0] names no folder"),
        ("a.toml", "[[datasets]]\n[[datasets.subsets]]\nis_reg = true", "datasets[0].subsets[0] names no folder"),
        ("a.toml", "[datasets]\nimage_directory = 'x'", "datasets is no list of tables"),
        ("a.toml", "datasets = ['x']", "datasets is no list of tables"),
        ("a.toml", "general = 1\n" + subset(""), "general is no table"),
        ("a.toml", "[[datasets]]\nsubsets = 'x'", "datasets[0].subsets is no list of tables"),
        ("a.toml", "datasets = [", "cannot be read"),
        ("a.toml", '[[datasets]]\nimage_directory = "C:\\Users\\me"', "cannot be read"),
        ("a.toml", "x = " + "[" * 5000, "cannot be read"),
        ("a.yaml", "", "names no dataset"),
        ("a.yaml", "just text", "names no dataset"),
        ("a.yaml", "job: extension", "names no dataset"),
        ("a.yaml", "config: [1]", "config is no table"),
        ("a.yaml", "config: {process: {datasets: []}}", "config.process is no list of tables"),
        ("a.yaml", "config: {process: [{datasets: [/style]}]}", "config.process[0].datasets is no list of tables"),
        ("a.yaml", "config: {process: [{type: extract}]}", "names no dataset"),
        ("a.yaml", "config: {process: [{datasets: [{}]}]}", "config.process[0].datasets[0] names no folder"),
        ("a.yaml", "config: {process: [{datasets: [{folder_path: 2024}]}]}", "folder_path=2024 cannot be used"),
        ("a.yaml", "a: [", "cannot be read"),
        ("a.yaml", "a: 1\n---\nb: 2", "cannot be read"),
        ("a.yaml", "[" * 5000, "cannot be read"),
        ("a.yaml", "a: 2024-13-45", "cannot be read"),
        ("a.yaml", "a: !!int ''", "cannot be read"),
        ("a.yaml", "a: !!bool maybe", "cannot be read"),
        ("a.yaml", "a: !!timestamp x", "cannot be read"),
        ("a.yaml", "? [a]\n: b", "cannot be read"),
    ],
)
def test_a_file_without_a_dataset_is_refused(read: Read, tmp_path: Path, name: str, text: str, what: str) -> None:
    error = error_of(lambda: read(text, name))
    assert error.what.startswith(f"dataset.import={tmp_path / name}")
    assert what in error.what
    assert len(str(error).splitlines()) == 2


@pytest.mark.parametrize(
    "tag",
    ["!!python/object:pathlib.Path {}", "!!python/object/apply:os.system ['touch ran']", "!!python/name:os.system ''"],
)
def test_yaml_runs_nothing(read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tag: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert "cannot be read" in error_of(lambda: read(f"a: {tag}", "job.yaml")).what
    assert not Path("ran").exists()


@pytest.mark.parametrize("text", [b"\xff\xfe[\x00", b"caption = '\xe9'"])
def test_a_file_in_another_encoding_is_refused(read: Read, text: bytes) -> None:
    assert "save it as UTF-8" in error_of(lambda: read(text)).remedy


def test_a_huge_file_is_refused_unread(read: Read) -> None:
    assert "bytes" in error_of(lambda: read(b"#" * (LARGEST_FILE + 1))).what


@pytest.mark.parametrize("place", ["absent.toml", "a\0b.toml", "x" * 5000 + ".toml", "~nobody-of-that-name/a.toml"])
def test_a_file_that_is_not_there_is_refused(place: str) -> None:
    assert error_of(lambda: read_import(place)).what.startswith("dataset.import=")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.toml").mkdir()
    assert "is no file" in error_of(lambda: read_import(str(tmp_path / "a.toml"))).what


@pytest.mark.parametrize("name", ["job.json", "pictures", "", ".toml"])
def test_another_suffix_is_refused(name: str) -> None:
    assert "neither TOML nor YAML" in error_of(lambda: read_import(name)).what


SYNTAX = ["[", "]", "{", "}", "[[", "]]", "'", '"', "\n", "\n  - ", ": ", "= ", "&a ", "*a", "<<: *a", "? ", "!!set "]
WORDS = ["null", "true", "-1", "1e999", "nan", ".inf", "0x" + "f" * 5000, "9" * 5000, "2024-13-45", "!!int ''"]
PIECES = st.text(max_size=8) | st.sampled_from(SYNTAX + WORDS)


@pytest.mark.parametrize(("name", "text"), [("a.toml", KOHYA), ("b.toml", MUSUBI), ("c.yaml", AI_TOOLKIT)])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_broken_file_raises_nothing_but_user_errors(name: str, text: str, data: st.DataObject) -> None:
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        stop = min(len(text), start + data.draw(st.integers(0, 12)))
        text = text[:start] + data.draw(PIECES) + text[stop:]
    survives(name, text.encode("utf-8", "surrogatepass"))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2000) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(
    options=st.dictionaries(
        st.sampled_from(["folder_path", "caption_ext", "resolution", "num_repeats", "is_reg", "mask_path", "other"]),
        VALUES,
    )
)
@settings(max_examples=100, deadline=None)
def test_any_values_raise_nothing_but_user_errors(options: dict[str, Any]) -> None:
    survives("job.yaml", dataset(**options).encode())


def survives(name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        file.write_bytes(content)
        with suppress(UserError):
            found = read_import(str(file))
            assert all(len(note.splitlines()) == 1 for note in found.notes)
            assert all(source.folder and source.repeats > 0 for source in found.sources)
