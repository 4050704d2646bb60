"""What becomes of a drawing before it is learned: where it lies on its paper, and in which inks it is printed.

One drawing of a subject teaches that drawing. The same one mirrored, small, on a wider paper, in blue, in chalk lines
teaches what all of these have in common, which is what an adapter for a new style has to leave alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from flux2_lora.miniature.icons import SIDE_PX

RGB = tuple[float, float, float]
WHITE: RGB = (1.0, 1.0, 1.0)
# Height and width in pixels, and how often each is trained. A drawing on the long ones lies beside bare paper, so that
# what is beyond an edge is known too.
SQUARE = (SIDE_PX, SIDE_PX)
CANVASES = {SQUARE: 0.7, (64, 64): 0.1, (96, 96): 0.06, (128, 192): 0.07, (192, 128): 0.07}
PLACES = {"": 0.7, ", mirrored": 0.15, ", small": 0.15}
SMALL = (0.5, 0.75)  # of its side
# How often every drawing is printed on each, in places and inks that are drawn.
COPIES = {SQUARE: 20, (64, 64): 4, (96, 96): 2, (128, 192): 2, (192, 128): 2}


def colours(first: RGB, second: RGB, like: Tensor) -> Tensor:
    """Both in [-1, 1], as [2 3 1 1]."""
    return torch.tensor([first, second], device=like.device).view(2, 3, 1, 1) * 2 - 1


def ramp(black: RGB, white: RGB) -> Callable[[Tensor], Tensor]:
    """An ink by brightness, on its paper; red, green and blue in [0, 1]."""

    def inked(pictures: Tensor) -> Tensor:
        light = (pictures.mean(1, keepdim=True) + 1) / 2
        low, high = colours(black, white, light)
        return torch.lerp(low, high, light)

    return inked


def on_paper(colour: RGB) -> Callable[[Tensor], Tensor]:
    """All colours, on a coloured paper that shines through."""
    return lambda pictures: (pictures + 1) * torch.tensor(colour, device=pictures.device).view(3, 1, 1) - 1


def lines(line: RGB, board: RGB) -> Callable[[Tensor], Tensor]:
    """Lines where the picture changes, on a board of one colour."""

    def drawn(pictures: Tensor) -> Tensor:
        wide = max(pictures.shape[-1] // 64, 1)
        padded = F.pad(pictures, (wide, wide, wide, wide), mode="replicate")
        across = padded[..., wide:-wide, 2 * wide :] - padded[..., wide:-wide, : -2 * wide]
        down = padded[..., 2 * wide :, wide:-wide] - padded[..., : -2 * wide, wide:-wide]
        edge = (across.abs() + down.abs()).amax(1, keepdim=True).clamp(0, 1)
        low, high = colours(board, line, edge)
        return torch.lerp(low, high, edge)

    return drawn


INKS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda pictures: pictures,
    ", in grey": ramp((0.0, 0.0, 0.0), WHITE),
    ", in red": ramp((0.45, 0.0, 0.08), WHITE),
    ", in blue": ramp((0.05, 0.1, 0.5), WHITE),
    ", in brown": ramp((0.22, 0.12, 0.05), (0.98, 0.93, 0.82)),
    ", inverted": torch.neg,
    ", on blue": on_paper((0.6, 0.78, 1.0)),
    ", on green": on_paper((0.7, 0.92, 0.68)),
    ", on pink": on_paper((1.0, 0.78, 0.85)),
    ", in chalk": lines(WHITE, (0.08, 0.25, 0.2)),
    ", in pen": lines((0.3, 0.16, 0.06), (0.97, 0.92, 0.8)),
}
PLAIN = 0.5  # how often a picture keeps its own inks
# Pairs of place and ink that no picture is trained in.
HELD_OUT = ((", mirrored", ", in grey"), (", small", ", in blue"), (", mirrored", ", on pink"))


@dataclass(frozen=True, kw_only=True)
class Print:
    """Drawings, by their indices, on one canvas (height and width, px), in one place and one ink.

    where: how large they are if they are small, how far to the right and how far down they lie, each in [0, 1].
    """

    drawings: Sequence[int]
    canvas: tuple[int, int]
    place: str
    ink: str
    where: tuple[float, float, float]


def prints(drawings: int, canvas: tuple[int, int], copies: int, draw: random.Random) -> Iterator[Print]:
    """All drawings on a canvas, so many times, each time in other company; on the square once more as they are."""
    if canvas == SQUARE:
        for part in parts(range(drawings)):
            yield Print(drawings=part, canvas=canvas, place="", ink="", where=(0.0, 0.0, 0.0))
    pairs = [(place, ink) for place, ink in product(PLACES, INKS) if (place, ink) not in HELD_OUT]
    often = [PLACES[place] * (PLAIN if not ink else (1 - PLAIN) / (len(INKS) - 1)) for place, ink in pairs]
    for _ in range(copies):
        for part in parts(draw.sample(range(drawings), drawings)):
            [(place, ink)] = draw.choices(pairs, often)
            where = (draw.random(), draw.random(), draw.random())
            yield Print(drawings=part, canvas=canvas, place=place, ink=ink, where=where)


def parts(drawings: Sequence[int]) -> Iterator[Sequence[int]]:
    return (drawings[start : start + 64] for start in range(0, len(drawings), 64))


def printed(drawings: Tensor, one: Print) -> Tensor:
    """All of its drawings, out of those [n 3 h w] in [-1, 1], printed: [m 3 *canvas]."""
    height, width = one.canvas
    scale, right, down = one.where
    side = min(height, width)
    if "small" in one.place:
        side = round(side * (SMALL[0] + (SMALL[1] - SMALL[0]) * scale))
    sized = F.interpolate(drawings[one.drawings], size=(side, side), mode="bicubic", antialias=True).clamp(-1, 1)
    left, top = round((width - side) * right), round((height - side) * down)
    placed = F.pad(sized, (left, width - side - left, top, height - side - top), value=1.0)
    if "mirrored" in one.place:
        placed = placed.flip(-1)
    return INKS[one.ink](placed)
