"""Grids: every word is there, in its own place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flux2_lora.inference.grid import _MOST_LINES, Section, _font, _fonts, _has, _lines, _wrapped, draw_grid

RED = (255, 0, 0)
LONG = "a watercolour of a lighthouse above the sea, soft light, long shadows, " * 2


def cell(side: int = 64) -> Image.Image:
    return Image.new("RGB", (side, side), RED)


def pixels(grid: Image.Image) -> np.ndarray:
    return np.asarray(grid).astype(int)


def red_rows(grid: Image.Image) -> list[tuple[int, int]]:
    """(first, last + 1) of the rows of red cells."""
    red = (pixels(grid) == RED).all(-1).any(1).astype(int)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], red, [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def columns_of(grid: Image.Image) -> list[int]:
    """Where red cells begin."""
    red = (pixels(grid) == RED).all(-1).any(0).astype(int)
    return np.flatnonzero(np.diff(np.concatenate([[0], red])) == 1).tolist()


@given(st.text(st.characters(codec="latin-1", categories=("L", "N", "P", "Zs")), max_size=200), st.integers(40, 300))
def test_wrapped_lines_fit_and_lose_nothing(text: str, width: int) -> None:
    font = _font(text, 14)
    lines = list(_lines(text, font, width))
    assert all(font.getlength(line) <= width for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())


def test_what_is_too_long_all_the_same_says_so() -> None:
    label = _wrapped("word " * 400, 14, 130, _MOST_LINES)
    assert len(label.lines) == _MOST_LINES
    assert label.lines[-1].endswith("…")
    assert label.font.getlength(label.lines[-1]) <= 130


def test_letters_that_the_usual_font_has_not_are_looked_for_in_others() -> None:
    usual, *others = _fonts(14)
    assert _font("a red kite", 14) is usual
    assert not _has(usual, "Ж")
    wider = [font for font in others if _has(font, "Ж")]
    if not wider:
        pytest.skip("no font with Cyrillic letters on this machine")
    assert _has(_font("ЖЖ a kite", 14), "Ж")


def test_long_labels_lie_over_no_picture_and_no_other_label() -> None:
    short, long = (
        draw_grid("t", [Section(columns=["base"], rows=[(label, [cell()]), ("next", [cell()])])], 64)
        for label in ("x", LONG)
    )
    [first, second], [_, plain] = red_rows(long), red_rows(short)
    assert first[1] - first[0] == second[1] - second[0] == 64
    assert second[0] > plain[0]
    left = columns_of(long)[0]
    labels = (pixels(long)[:, :left] < 128).all(-1)
    assert not labels[:, left - 9 :].any()
    written = np.flatnonzero(labels[first[0] : second[0]].any(1))
    assert written.max() + first[0] < second[0] - 2


def test_headings_stay_above_their_own_column() -> None:
    heads = ["my_watercolour_adapter_of_last_spring x 0.75", "ÿ" * 60, "base"]
    grid = draw_grid("t", [Section(columns=heads, rows=[("a", [cell()] * 3)])], 64)
    [(top, bottom)] = red_rows(grid)
    assert bottom - top == 64
    ink = (pixels(grid) < 200).all(-1)[44:top]
    for left in columns_of(grid)[1:]:
        assert not ink[:, left - 9 : left - 1].any()
    assert ink.any()


def test_headings_of_several_lines_push_the_pictures_down() -> None:
    one, many = (draw_grid("t", [Section(columns=[head], rows=[("a", [cell()])])], 64) for head in ("a", "a " * 60))
    lines = _wrapped("a " * 60, 14, 64, _MOST_LINES).lines
    assert len(lines) > 2
    assert red_rows(many)[0][0] - red_rows(one)[0][0] == (len(lines) - 1) * 18


def test_a_title_wider_than_the_grid_wraps() -> None:
    one, many = (draw_grid(title, [Section(columns=["a"], rows=[("", [cell()])])], 64) for title in ("t", LONG))
    assert red_rows(many)[0][0] > red_rows(one)[0][0]
    assert many.width == one.width


def test_a_section_without_headings_may_have_more_pictures_than_the_others_columns() -> None:
    sections = [Section(columns=["base"], rows=[("a", [cell()])]), Section(columns=[], rows=[("b", [cell()] * 4)])]
    assert len(columns_of(draw_grid("t", sections, 64))) == 4


def test_small_pictures_are_enlarged_without_blur() -> None:
    checks = Image.fromarray(np.indices((32, 32)).sum(0).astype("uint8") % 2 * 255)
    grid = pixels(draw_grid("t", [Section(columns=["a"], rows=[("", [checks])])], 128))
    inside = grid[74:190, 152:270]
    assert set(np.unique(inside)) == {0, 255}
