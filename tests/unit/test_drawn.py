"""The files that previews leave, and what of them a new run clears away."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flux2_lora.inference.drawn import (
    Texts,
    drawn_steps,
    forget_steps,
    read_texts,
    spread,
    step_folder,
    thumbnail_files,
    write_texts,
    write_thumbnails,
)


def draw(previews: Path, step: int) -> None:
    here = step_folder(previews, step)
    here.mkdir(parents=True)
    (here / "0000.png").touch()
    here.with_suffix(".png").touch()


def test_steps_come_in_order_and_an_empty_one_was_not_drawn(tmp_path: Path) -> None:
    for step in (200, 0, 1_000_000):
        draw(tmp_path, step)
    step_folder(tmp_path, 100).mkdir()
    assert drawn_steps(tmp_path) == [0, 200, 1_000_000]


def test_a_run_that_begins_forgets_the_steps_and_nothing_else(tmp_path: Path) -> None:
    draw(tmp_path, 100)
    (tmp_path / "mine.png").touch()
    forget_steps(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.png"]


def test_texts_come_back_as_they_were(tmp_path: Path) -> None:
    texts = Texts(prompts=["猫", 'a "kite"\n'], edited="é")
    write_texts(tmp_path, texts)
    assert read_texts(tmp_path) == texts


@pytest.mark.parametrize("content", ["", "[]", '{"prompts": 3, "edited": ""}', "{"])
def test_texts_that_cannot_be_read_are_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "prompts.json").write_text(content)
    assert read_texts(tmp_path) is None


def test_thumbnails_take_the_place_of_earlier_ones(tmp_path: Path) -> None:
    for count in (3, 1):
        write_thumbnails(tmp_path, [Image.new("RGB", (8, 8))] * count)
    assert [file.name for file in thumbnail_files(tmp_path)] == ["000.webp"]


@given(st.integers(1, 200), st.integers(2, 30))
def test_a_spread_keeps_both_ends_and_the_order(count: int, most: int) -> None:
    found = spread(range(count), most)
    assert (found[0], found[-1]) == (0, count - 1)
    assert found == sorted(set(found))
    assert len(found) == min(count, most)
