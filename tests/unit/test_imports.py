"""What the configuration files of kohya, musubi-tuner and ai-toolkit become, and what is noted of the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flux2_lora.dataset.imports import ORDERS, Imported
from flux2_lora.dataset.spec import SourceSpec
from tests.configurations import AI_TOOLKIT, KOHYA, MUSUBI, Read, dataset, reader, subset


def sourced(**options: Any) -> SourceSpec:
    """As imports make them: their repeats are said once, whatever the folder is called."""
    return SourceSpec(named_repeats=False, **options)


@pytest.fixture
def read(tmp_path: Path) -> Read:
    return reader(tmp_path)


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


@pytest.mark.parametrize("option", ["enable_bucket = false"])
def test_what_trains_otherwise_where_it_is_off_is_noted(read: Read, option: str) -> None:
    (note,) = read(f"[[datasets]]\nimage_directory = 'absent'\n{option}").notes
    assert "enable_bucket=false is not taken over" in note
