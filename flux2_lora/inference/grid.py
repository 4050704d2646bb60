"""Labelled picture grids that are read at first glance: a title, columns with headings, rows with captions.

Law: no word lies over another or outside its place. Labels wrap, rows and headings grow with them, and what is too long
all the same ends in an ellipsis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_INK, _PALE, _PAPER, _FRAME = "#1a1a1a", "#595959", "#ffffff", "#d9d9d9"
_GAP, _LABELS_PX, _MOST_LINES = 10, (150, 200, 250), 14
_TITLE, _TEXT, _LINE_PX, _TITLE_LINE_PX = 18, 14, 18, 24


@dataclass(frozen=True, kw_only=True)
class Section:
    """A block of rows under common column headings. rows: (label, one picture or None a column).

    A section without columns has rows without headings.
    """

    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Image.Image | None]]]

    @property
    def width(self) -> int:
        """The number of its columns."""
        return max([len(self.columns), *(len(pictures) for _, pictures in self.rows)])


def draw_grid(title: str, sections: Sequence[Section], cell_px: int = 128) -> Image.Image:
    """Sections below each other; pictures are scaled to fit cell_px, small ones without blur."""
    label_px = _label_px(sections, cell_px)
    width = label_px + max(section.width for section in sections) * (cell_px + _GAP) + 2 * _GAP
    lines = _wrapped(title, _TITLE, width - 2 * _GAP, _MOST_LINES)
    blocks = [_Block(section, cell_px, label_px) for section in sections]
    top = 20 + len(lines) * _TITLE_LINE_PX
    canvas = Image.new("RGB", (width, top + sum(block.height + _GAP for block in blocks)), _PAPER)
    pen = ImageDraw.Draw(canvas)
    _write(pen, (_GAP, 12), lines, _TITLE, _INK, _TITLE_LINE_PX)
    for block in blocks:
        block.draw(canvas, pen, top)
        top += block.height + _GAP
    return canvas


class _Block:
    """A section with its labels broken into lines, and the room that these take."""

    def __init__(self, section: Section, cell_px: int, label_px: int) -> None:
        self.section, self.cell_px, self.label_px = section, cell_px, label_px
        self.headings = [_wrapped(heading, _TEXT, cell_px, _MOST_LINES) for heading in section.columns]
        self.labels = [_wrapped(label, _TEXT, label_px - 2 * _GAP, _MOST_LINES) for label, _ in section.rows]
        self.heading_px = 8 + _LINE_PX * max(map(len, self.headings)) if self.headings else 0
        self.row_px = [max(cell_px, 4 + len(label) * _LINE_PX) + _GAP for label in self.labels]

    @property
    def height(self) -> int:
        return self.heading_px + sum(self.row_px)

    def draw(self, canvas: Image.Image, pen: ImageDraw.ImageDraw, top: int) -> None:
        for column, heading in enumerate(self.headings):
            # Headings stand on the pictures: the last line of each at the same height.
            y = top + 4 + self.heading_px - 8 - len(heading) * _LINE_PX
            _write(pen, (self._left(column), y), heading, _TEXT, _PALE)
        top += self.heading_px
        for (_, pictures), label, height in zip(self.section.rows, self.labels, self.row_px, strict=True):
            _write(pen, (_GAP, top + 4), label, _TEXT, _INK)
            for column, picture in enumerate(pictures):
                if picture is not None:
                    _paste(canvas, pen, picture, self._left(column), top, self.cell_px)
            top += height

    def _left(self, column: int) -> int:
        return self.label_px + column * (self.cell_px + _GAP)


def _label_px(sections: Sequence[Section], cell_px: int) -> int:
    """The narrowest column of labels beside which no row has to grow, else the widest."""
    labels = [label for section in sections for label, _ in section.rows]
    most = (cell_px - 4) // _LINE_PX

    def fits(width: int) -> bool:
        return all(len(list(_lines(label, _TEXT, width - 2 * _GAP))) <= most for label in labels)

    return next(filter(fits, _LABELS_PX), _LABELS_PX[-1])


def _paste(canvas: Image.Image, pen: ImageDraw.ImageDraw, picture: Image.Image, x: int, y: int, cell_px: int) -> None:
    scale = cell_px / max(picture.size)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    enlarging = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.BICUBIC
    method = enlarging if scale > 1 else Image.Resampling.LANCZOS
    canvas.paste(picture.convert("RGB").resize(size, method), (x, y))
    pen.rectangle((x - 1, y - 1, x + size[0], y + size[1]), outline=_FRAME)


def _write(
    pen: ImageDraw.ImageDraw, place: tuple[int, int], lines: Sequence[str], size: int, ink: str, line_px: int = _LINE_PX
) -> None:
    for index, line in enumerate(lines):
        pen.text((place[0], place[1] + index * line_px), line, font=_font(size), fill=ink)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _wrapped(text: str, size: int, width_px: int, most: int) -> list[str]:
    """At most `most` lines that fit; the last ends in an ellipsis where words are left out."""
    lines = list(_lines(text, size, width_px))
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and _font(size).getlength(last + "…") > width_px:
        last = last[:-1]
    return [*lines[: most - 1], last + "…"]


def _lines(text: str, size: int, width_px: int) -> Iterator[str]:
    """Broken at spaces, and inside a word where it does not fit by itself."""
    line = ""
    for word in text.split():
        if line and _font(size).getlength(f"{line} {word}") > width_px:
            yield line
            line = ""
        line = f"{line} {word}" if line else word
        while len(line) > 1 and _font(size).getlength(line) > width_px:
            fits = _fitting(line, size, width_px)
            yield line[:fits]
            line = line[fits:]
    yield line


def _fitting(word: str, size: int, width_px: int) -> int:
    """How many characters of a word fit into a line, at least one; a break after _ - / . = is preferred."""
    most = next(n for n in range(len(word), 0, -1) if n == 1 or _font(size).getlength(word[:n]) <= width_px)
    breaks = [n for n in range(most, most // 2, -1) if word[n - 1] in "_-/.="]
    return breaks[0] if breaks else most
