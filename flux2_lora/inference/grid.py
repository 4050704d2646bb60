"""Labelled picture grids that are read at first glance: a title, columns with headings, rows with captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_INK, _PALE, _PAPER, _FRAME = "#1a1a1a", "#6b6b6b", "#ffffff", "#d9d9d9"
_GAP, _LABEL_PX = 10, 150


@dataclass(frozen=True, kw_only=True)
class Section:
    """A block of rows under common column headings. rows: (label, one picture or None a column)."""

    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Image.Image | None]]]


def draw_grid(title: str, sections: Sequence[Section], cell_px: int = 128) -> Image.Image:
    """Sections below each other; pictures are scaled to fit cell_px, small ones without blur."""
    wide = max(len(section.columns) for section in sections)
    width = _LABEL_PX + wide * (cell_px + _GAP) + 2 * _GAP
    heights = [_heading_px() + len(section.rows) * (cell_px + _GAP) for section in sections]
    canvas = Image.new("RGB", (width, 44 + sum(heights) + _GAP * len(sections)), _PAPER)
    pen = ImageDraw.Draw(canvas)
    pen.text((_GAP, 12), _shortened(title, _font(18), width - 2 * _GAP), font=_font(18), fill=_INK)
    top = 44
    for section, height in zip(sections, heights, strict=True):
        _draw_section(canvas, pen, section, top, cell_px)
        top += height + _GAP
    return canvas


def _draw_section(canvas: Image.Image, pen: ImageDraw.ImageDraw, section: Section, top: int, cell_px: int) -> None:
    for column, heading in enumerate(section.columns):
        left = _LABEL_PX + column * (cell_px + _GAP)
        pen.text((left, top + 4), _shortened(heading, _font(14), cell_px), font=_font(14), fill=_PALE)
    for row, (label, pictures) in enumerate(section.rows):
        y = top + _heading_px() + row * (cell_px + _GAP)
        lines = _wrapped(label, _font(14), _LABEL_PX - 2 * _GAP)
        pen.multiline_text((_GAP, y + 4), "\n".join(lines), font=_font(14), fill=_INK, spacing=4)
        for column, picture in enumerate(pictures):
            if picture is not None:
                _paste(canvas, pen, picture, _LABEL_PX + column * (cell_px + _GAP), y, cell_px)


def _paste(canvas: Image.Image, pen: ImageDraw.ImageDraw, picture: Image.Image, x: int, y: int, cell_px: int) -> None:
    scale = cell_px / max(picture.size)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    method = Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS
    canvas.paste(picture.convert("RGB").resize(size, method), (x, y))
    pen.rectangle((x - 1, y - 1, x + size[0], y + size[1]), outline=_FRAME)


def _heading_px() -> int:
    return 26


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int) -> list[str]:
    """Break at spaces into at most six lines that fit."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width_px or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return [_shortened(line, font, width_px) for line in lines[:6]]


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int) -> str:
    if font.getlength(text) <= width_px:
        return text
    while text and font.getlength(text + "…") > width_px:
        text = text[:-1]
    return text + "…"
