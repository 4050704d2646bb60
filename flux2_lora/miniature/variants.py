"""What becomes of a drawing before it is learned: where it lies on its paper, and in which inks it is printed.

One drawing of a subject teaches that drawing. The same one mirrored, small, on a wider paper, in blue, in chalk lines
teaches what all of these have in common, which is what an adapter for a new style has to leave alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from flux2_lora.miniature.icons import SIDE_PX

RGB = tuple[float, float, float]
WHITE: RGB = (1.0, 1.0, 1.0)
# Height and width in pixels, and how often each is trained. A drawing on the larger ones is surrounded by paper, so
# that what lies beyond an edge is known too.
SQUARE = (SIDE_PX, SIDE_PX)
CANVASES = {SQUARE: 0.76, (64, 96): 0.08, (96, 64): 0.08, (96, 96): 0.08}
PLACES = {"": 0.7, ", mirrored": 0.15, ", small": 0.15}
SMALL = (0.5, 0.75)  # of its side
COPIES = 3  # of each drawing on each of the larger papers, places and inks drawn for each


def ramp(black: RGB, white: RGB) -> Callable[[Tensor], Tensor]:
    """An ink by brightness, on its paper; red, green and blue in [0, 1]."""

    def inked(pictures: Tensor) -> Tensor:
        light = (pictures.mean(1, keepdim=True) + 1) / 2
        low, high = torch.tensor([black, white]).view(2, 3, 1, 1) * 2 - 1
        return torch.lerp(low, high, light)

    return inked


def on_paper(colour: RGB) -> Callable[[Tensor], Tensor]:
    """All colours, on a coloured paper that shines through."""
    paper = torch.tensor(colour).view(3, 1, 1)
    return lambda pictures: (pictures + 1) * paper - 1


def chalk(pictures: Tensor) -> Tensor:
    """White lines where the picture changes, on a dark green board."""
    padded = F.pad(pictures, (1, 1, 1, 1), mode="replicate")
    across = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    down = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    edge = (across.abs() + down.abs()).amax(1, keepdim=True).clamp(0, 1)
    board, white = torch.tensor([(0.08, 0.25, 0.2), WHITE]).view(2, 3, 1, 1) * 2 - 1
    return torch.lerp(board, white, edge)


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
    ", in white": chalk,
}
PLAIN = 0.5  # how often a picture keeps its own inks
# Pairs of place and ink that no picture is trained in.
HELD_OUT = ((", mirrored", ", in grey"), (", small", ", in blue"), (", mirrored", ", on pink"))


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A drawing, by its index, on a canvas (height and width, px), in a place and an ink; how often is relative."""

    drawing: int
    canvas: tuple[int, int]
    place: str
    ink: str
    often: float = 1.0


def variants(drawings: int, canvas: tuple[int, int], generator: torch.Generator) -> Iterator[Variant]:
    """Every drawing on a canvas: in every place and ink on the square that it was drawn for, else in some of them."""
    for drawing in range(drawings):
        if canvas == SQUARE:
            for place, ink in product(PLACES, INKS):
                often = PLACES[place] * inked(ink)
                yield Variant(drawing=drawing, canvas=canvas, place=place, ink=ink, often=often)
            continue
        for _ in range(COPIES):
            place = pick(list(PLACES), list(PLACES.values()), generator)
            ink = pick(list(INKS), [inked(ink) for ink in INKS], generator)
            yield Variant(drawing=drawing, canvas=canvas, place=place, ink=ink)


def inked(ink: str) -> float:
    return (1 - PLAIN) / (len(INKS) - 1) if ink else PLAIN


def pick(names: Sequence[str], weights: Sequence[float], generator: torch.Generator) -> str:
    return names[int(torch.multinomial(torch.tensor(weights), 1, generator=generator))]


def made(drawing: Tensor, variant: Variant, generator: torch.Generator) -> Tensor:
    """A drawing [3 h w] in [-1, 1] as its variant: [3 *canvas], places on its paper drawn from the generator."""
    height, width = variant.canvas
    scale, right, down = torch.rand(3, generator=generator).tolist()
    side = min(height, width)
    if "small" in variant.place:
        side = round(side * (SMALL[0] + (SMALL[1] - SMALL[0]) * scale))
    sized = F.interpolate(drawing[None], size=(side, side), mode="bicubic", antialias=True).clamp(-1, 1)
    left, top = round((width - side) * right), round((height - side) * down)
    placed = F.pad(sized, (left, width - side - left, top, height - side - top), value=1.0)
    if "mirrored" in variant.place:
        placed = placed.flip(-1)
    return INKS[variant.ink](placed)[0]
