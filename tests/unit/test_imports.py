"""The configuration files of kohya, musubi-tuner and ai-toolkit, as people write and break them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flux2_lora.dataset.imports import LARGEST_FILE, ORDERS, Imported, read_import
from flux2_lora.dataset.spec import SourceSpec
from flux2_lora.errors import UserError

KOHYA = """
[general]
shuffle_caption = true
caption_extension = ".txt"
keep_tokens = 1
enable_bucket = true
bucket_reso_steps = 64
max_bucket_reso = 1536

[[datasets]]
resolution = [1024, 576]
batch_size = 4
keep_tokens = 2

  [[datasets.subsets]]
  image_dir = "/style"
  num_repeats = 10
  class_tokens = "a drawing"
  keep_tokens = 3
  flip_aug = true
  color_aug = true

  [[datasets.subsets]]
  image_dir = "/class"
  is_reg = true

[[datasets]]
resolution = 512

  [[datasets.subsets]]
  image_dir = "/style"
  shuffle_caption = false
  random_crop = true
  alpha_mask = true
  caption_dropout_rate = 0.05
"""

MUSUBI = """
[general]
resolution = [960, 544]
caption_extension = ".txt"
batch_size = 1
enable_bucket = true
bucket_no_upscale = false

[[datasets]]
image_directory = "/one"
cache_directory = "/cache/one"
num_repeats = 2

[[datasets]]
image_directory = "/two"
resolution = 1024
"""

AI_TOOLKIT = """
job: extension
config:
  name: my_style
  process:
    - type: sd_trainer
      training_folder: output
      trigger_word: p3r5on
      network: {type: lora, linear: 16}
      datasets:
        - folder_path: /style
          caption_ext: txt
          caption_dropout_rate: 0.05
          shuffle_tokens: false
          cache_latents_to_disk: true
          resolution: [512, 768, 1024]
          num_repeats: 3
          keep_tokens: 1
          flip_x: true
          mask_path: /masks
          loss_multiplier: 0.5
        - folder_path: /class
          is_reg: true
          trigger_word: other
          default_caption: a drawing
          num_frames: 1
          do_i2v: true
          mask_min_value: 0.1
          network_weight: 1
          controls: []
          flip_y: false
      train: {batch_size: 4, steps: 2000}
    - type: other
      datasets:
        - dataset_path: /third
          shuffle_tokens: true
          random_crop: true
          alpha_mask: true
"""

Read = Callable[..., Imported]


def sourced(**options: Any) -> SourceSpec:
    """As imports make them: their repeats are said once, whatever the folder is called."""
    return SourceSpec(named_repeats=False, **options)


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def write_and_read(text: str | bytes, name: str = "kohya.toml") -> Imported:
        file = tmp_path / name
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_import(str(file))

    return write_and_read


def subset(options: str) -> str:
    return f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '/style'\n{options}\n"


def dataset(**options: Any) -> str:
    return json.dumps({"config": {"process": [{"datasets": [{"folder_path": "/style", **options}]}]}})


def error_of(action: Callable[[], object]) -> UserError:
    with pytest.raises(UserError) as error:
        action()
    return error.value


def test_a_subset_has_its_own_options_else_its_datasets_else_the_general_ones(read: Read) -> None:
    assert read(KOHYA).sources == [
        sourced(
            folder="/style",
            repeats=10,
            resolution=[768],
            default_caption="a drawing",
            caption_suffixes=[".txt"],
            shuffle_tags=ORDERS,
            keep_tags=3,
            flip=True,
        ),
        sourced(
            folder="/class",
            regularisation=True,
            resolution=[768],
            caption_suffixes=[".txt"],
            shuffle_tags=ORDERS,
            keep_tags=2,
        ),
        sourced(
            folder="/style",
            resolution=[512],
            caption_suffixes=[".txt"],
            caption_dropout=0.05,
            shuffle_tags=0,
            keep_tags=1,
            alpha="mask",
            crop="random",
        ),
    ]


def test_what_is_not_taken_over_is_noted_with_its_place(read: Read) -> None:
    assert read(KOHYA).notes == [
        "kohya.toml: batch_size=4 is not taken over (datasets[0]); batch_size=4 does it for all sources",
        "kohya.toml: color_aug=true is not taken over (datasets[0].subsets[0])",
    ]


def test_musubi_names_folders_in_its_datasets(read: Read) -> None:
    one = sourced(folder="/one", repeats=2, resolution=[723], caption_suffixes=[".txt"])
    two = sourced(folder="/two", resolution=[1024], caption_suffixes=[".txt"])
    assert read(MUSUBI) == Imported([one, two], [])


def test_ai_toolkit_datasets_of_all_processes_are_read(read: Read) -> None:
    assert read(AI_TOOLKIT, "job.yaml").sources == [
        sourced(
            folder="/style",
            repeats=3,
            weight=0.5,
            resolution=[512, 768, 1024],
            trigger_word="p3r5on",
            caption_suffixes=[".txt"],
            caption_dropout=0.05,
            shuffle_tags=0,
            keep_tags=1,
            masks="/masks",
            flip=True,
        ),
        sourced(folder="/class", regularisation=True, trigger_word="other", default_caption="a drawing"),
        sourced(folder="/third", shuffle_tags=ORDERS, crop="random", alpha="mask"),
    ]


def test_of_ai_toolkit_one_note_stands_for_all_that_is_no_dataset(read: Read) -> None:
    assert read(AI_TOOLKIT, "job.yml").notes == ["job.yml: only its datasets are taken over"]


@pytest.mark.parametrize(
    ("name", "text"), [("a.toml", subset("")), ("a.TOML", subset("")), ("a.yaml", dataset()), ("a.YML", dataset())]
)
def test_a_byte_order_mark_is_no_content(read: Read, name: str, text: str) -> None:
    assert read(b"\xef\xbb\xbf" + text.encode(), name).sources == [sourced(folder="/style")]


@pytest.mark.parametrize(
    "option",
    ["class_tokens = ''", "caption_extension = ''", "conditioning_data_dir = ''"],
)
def test_an_empty_text_leaves_the_option_to_the_dataset(read: Read, option: str) -> None:
    assert read(subset(option)) == Imported([sourced(folder="/style")], [])


@pytest.mark.parametrize(
    ("option", "value", "field", "taken"),
    [
        ("caption_ext", ".caption", "caption_suffixes", [".caption"]),
        ("caption_type", "caption", "caption_suffixes", [".caption"]),
        ("resolution", 768, "resolution", [768]),
        ("caption_dropout_rate", "5e-2", "caption_dropout", 0.05),
        ("trigger_word", " p3r5on\n", "trigger_word", "p3r5on"),
        ("default_caption", None, "default_caption", None),
        ("shuffle_tokens", True, "shuffle_tags", ORDERS),
        ("random_crop", False, "crop", "center"),
        ("alpha_mask", False, "alpha", "background"),
    ],
)
def test_a_value_becomes_the_sources(read: Read, option: str, value: Any, field: str, taken: Any) -> None:
    [source] = read(dataset(**{option: value}), "job.yaml").sources
    assert getattr(source, field) == taken


def test_conditioning_pictures_are_masks(read: Read) -> None:
    [source] = read(subset("conditioning_data_dir = '/masks'")).sources
    assert source.masks == "/masks"


@pytest.mark.parametrize(
    ("option", "note"),
    [
        ("caption_prefix = 'best, '", "caption_prefix='best, ' is not taken over (datasets[0].subsets[0])"),
        ("face_crop_aug_range = [1.0, 3.0]", "face_crop_aug_range=[1.0, 3.0] is not"),
        ("bucket_no_upscale = true", "dataset.max_upscale=1 does it for all sources"),
        ("validation_split = 0.2", "dataset.holdout=0.2 does it for all sources"),
        ("'two\\nlines' = 1", "two\\nlines=1 is not"),
        ("a = {b = {c = 1}}", "a={'b': {...}} is not"),
    ],
)
def test_an_option_that_changes_training_is_noted(read: Read, option: str, note: str) -> None:
    [line] = read(subset(option.replace("'two\\nlines'", '"two\\nlines"'))).notes
    assert line.startswith("kohya.toml: ")
    assert note in line
    assert "\n" not in line


@pytest.mark.parametrize("option", ["flip_y", "invert_mask", "augments", "token_dropout_rate", "video_directory"])
@pytest.mark.parametrize("value", [False, 0, 0.0, "", None, []])
def test_what_is_switched_off_is_not_noted(read: Read, option: str, value: Any) -> None:
    assert len(read(dataset(**{option: value}), "job.yaml").notes) == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("cache_latents", True),
        ("cache_text_embeddings", True),
        ("enable_bucket", True),
        ("buckets", True),
        ("bucket_tolerance", 32),
        ("min_bucket_reso", 256),
        ("batch_size", 1),
        ("num_frames", 1),
        ("num_workers", 4),
        ("type", "image"),
        ("mask_min_value", 0.1),
    ],
)
def test_what_is_the_same_here_is_not_noted(read: Read, option: str, value: Any) -> None:
    assert len(read(dataset(**{option: value}), "job.yaml").notes) == 1


def test_one_note_names_all_places_of_an_option(read: Read) -> None:
    [note] = read(subset("color_aug = true") + subset("color_aug = true")).notes
    assert note.endswith("(datasets[0].subsets[0], datasets[1].subsets[0])")


def test_a_general_option_that_a_subset_takes_back_is_not_noted(read: Read) -> None:
    assert read("[general]\ncolor_aug = true\n" + subset("color_aug = false")).notes == []


def test_the_training_part_of_a_toml_is_noted_once(read: Read) -> None:
    assert read("learning_rate = 1e-4\nnetwork_dim = 16\n" + subset("")).notes == [
        "kohya.toml: only its datasets are taken over"
    ]


def test_a_source_of_no_repeats_is_left_out_with_a_note(read: Read) -> None:
    found = read(subset("num_repeats = 0\ncolor_aug = true") + subset(""))
    assert found.sources == [sourced(folder="/style")]
    assert found.notes == ["kohya.toml: datasets[0].subsets[0] is left out, its num_repeats is 0"]


def test_a_file_that_repeats_nothing_is_refused(read: Read) -> None:
    assert "repeats every dataset 0 times" in error_of(lambda: read(subset("num_repeats = 0"))).what


@pytest.mark.parametrize("folder", ["pictures", "nested/pictures", "./pictures"])
def test_a_folder_beside_the_file_is_found(read: Read, tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir(parents=True)
    [source] = read(f"[[datasets]]\nimage_directory = '{folder}'").sources
    assert Path(source.folder or "") == tmp_path / folder


def test_a_folder_of_the_working_directory_comes_first(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in (tmp_path / "pictures", tmp_path / "work" / "pictures"):
        place.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    assert read("[[datasets]]\nimage_directory = 'pictures'").sources == [sourced(folder="pictures")]


@pytest.mark.parametrize("folder", ["absent", "~/pictures", r"C:\pictures", "x" * 5000])
def test_a_folder_that_is_nowhere_keeps_its_text(read: Read, folder: str) -> None:
    assert read(f"[[datasets]]\nimage_directory = '{folder}'").sources == [sourced(folder=folder)]


def test_masks_are_found_as_folders_are(read: Read, tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    [source] = read(dataset(mask_path="masks"), "job.yaml").sources
    assert source.masks == str(tmp_path / "masks")


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


@pytest.mark.parametrize("option", ["enable_bucket = false"])
def test_what_trains_otherwise_where_it_is_off_is_noted(read: Read, option: str) -> None:
    (note,) = read(f"[[datasets]]\nimage_directory = 'absent'\n{option}").notes
    assert "enable_bucket=false is not taken over" in note
