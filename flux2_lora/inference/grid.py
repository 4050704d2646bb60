"""Labelled picture grids that are read at first glance: a title, columns with headings, rows with captions.

Law: no word lies over another or outside its place. Labels wrap, rows and headings grow with them, and what is too long
all the same ends in an ellipsis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont

_INK, _PALE, _PAPER, _FRAME = "#1a1a1a", "#595959", "#ffffff", "#d9d9d9"
_GAP, _LABELS_PX, _MOST_LINES = 10, (150, 200, 250), 14
_TITLE, _TEXT, _LINE_PX, _TITLE_LINE_PX = 18, 14, 18, 24
# Pillow's own font has hardly more than ASCII; of these a desktop has one or the other.
_WIDER = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "arial.ttf", "Arial Unicode.ttf"),
    *("NotoSansCJK-Regular.ttc", "msyh.ttc", "YuGothM.ttc", "malgun.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc"),
)
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True, kw_only=True)
class _Label:
    """Lines that fit, in a font that has their letters."""

    lines: Sequence[str]
    font: Font


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
    heading = _wrapped(title, _TITLE, width - 2 * _GAP, _MOST_LINES)
    blocks = [_Block(section, cell_px, label_px) for section in sections]
    top = 20 + len(heading.lines) * _TITLE_LINE_PX
    canvas = Image.new("RGB", (width, top + sum(block.height + _GAP for block in blocks)), _PAPER)
    pen = ImageDraw.Draw(canvas)
    _write(pen, (_GAP, 12), heading, _INK, _TITLE_LINE_PX)
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
        self.heading_px = 8 + _LINE_PX * max(len(heading.lines) for heading in self.headings) if self.headings else 0
        tallest = [
            max((_scaled(picture, cell_px)[1] for picture in pictures if picture is not None), default=cell_px)
            for _, pictures in section.rows
        ]
        words = [4 + len(label.lines) * _LINE_PX for label in self.labels]
        self.row_px = [max(both) + _GAP for both in zip(tallest, words, strict=True)]

    @property
    def height(self) -> int:
        return self.heading_px + sum(self.row_px)

    def draw(self, canvas: Image.Image, pen: ImageDraw.ImageDraw, top: int) -> None:
        for column, heading in enumerate(self.headings):
            # Headings stand on the pictures: the last line of each at the same height.
            y = top + 4 + self.heading_px - 8 - len(heading.lines) * _LINE_PX
            _write(pen, (self._left(column), y), heading, _PALE)
        top += self.heading_px
        for (_, pictures), label, height in zip(self.section.rows, self.labels, self.row_px, strict=True):
            _write(pen, (_GAP, top + 4), label, _INK)
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
        return all(len(list(_lines(label, _font(label, _TEXT), width - 2 * _GAP))) <= most for label in labels)

    return next(filter(fits, _LABELS_PX), _LABELS_PX[-1])


def _paste(canvas: Image.Image, pen: ImageDraw.ImageDraw, picture: Image.Image, x: int, y: int, cell_px: int) -> None:
    scale, size = cell_px / max(picture.size), _scaled(picture, cell_px)
    enlarging = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.BICUBIC
    method = enlarging if scale > 1 else Image.Resampling.LANCZOS
    canvas.paste(picture.convert("RGB").resize(size, method), (x, y))
    pen.rectangle((x - 1, y - 1, x + size[0], y + size[1]), outline=_FRAME)


def _scaled(picture: Image.Image, cell_px: int) -> tuple[int, int]:
    """Width and height in a cell."""
    scale = cell_px / max(picture.size)
    return max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)


def _write(pen: ImageDraw.ImageDraw, place: tuple[int, int], label: _Label, ink: str, line_px: int = _LINE_PX) -> None:
    for index, line in enumerate(label.lines):
        pen.text((place[0], place[1] + index * line_px), line, font=label.font, fill=ink)


def _font(text: str, size: int) -> Font:
    """The first of the fonts here that has the most of the text's letters."""
    letters = set(text)
    return max(_fonts(size), key=lambda font: sum(_has(font, letter) for letter in letters))


@cache
def _fonts(size: int) -> list[Font]:
    found = (_system_font(name, size) for name in _WIDER)
    return [ImageFont.load_default(size), *(font for font in found if font is not None)]


def _system_font(name: str, size: int) -> Font | None:
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


@cache
def _has(font: Font, letter: str) -> bool:
    """Whether it looks other than what stands for a letter that the font has not."""
    return bytes(font.getmask(letter)) != bytes(font.getmask("\U0010ffff"))


def _wrapped(text: str, size: int, width_px: int, most: int) -> _Label:
    """At most `most` lines that fit; the last ends in an ellipsis where words are left out."""
    font = _font(text, size)
    lines = list(_lines(text, font, width_px))
    if len(lines) > most:
        last = lines[most - 1]
        while last and font.getlength(last + "…") > width_px:
            last = last[:-1]
        lines = [*lines[: most - 1], last + "…"]
    return _Label(lines=lines, font=font)


def _lines(text: str, font: Font, width_px: int) -> Iterator[str]:
    """Broken at spaces, and inside a word where it does not fit by itself."""
    line = ""
    for word in text.split():
        if line and font.getlength(f"{line} {word}") > width_px:
            yield line
            line = ""
        line = f"{line} {word}" if line else word
        while len(line) > 1 and font.getlength(line) > width_px:
            fits = _fitting(line, font, width_px)
            yield line[:fits]
            line = line[fits:]
    yield line


def _fitting(word: str, font: Font, width_px: int) -> int:
    """How many characters of a word fit into a line, at least one; a break after _ - / . = is preferred."""
    most = next(n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width_px)
    breaks = [n for n in range(most, most // 2, -1) if word[n - 1] in "_-/.="]
    return breaks[0] if breaks else most
