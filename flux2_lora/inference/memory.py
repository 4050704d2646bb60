"""How many pictures fit in memory, said before they are begun; and where not even one does, the size that fits.

An estimate on the safe side: what a forward pass holds at most beside the weights, as measured on miniatures of both
architectures at 768 and 1536 px (16 to 32 numbers a token and unit of width), or the autoencoder in small tiles. A step
that goes back through the model holds the inputs of all blocks, and one block's activations. Tests hold both against
measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from flux2_lora.devices import compute_dtype, free_bytes
from flux2_lora.errors import UserError
from flux2_lora.families import Model, outline
from flux2_lora.inference.pictures import SMALL_TILE_PX, coding_bytes
from flux2_lora.networks.transformers import blocks_in
from flux2_lora.planning.choose import drawing_plan
from flux2_lora.planning.hardware import Card
from flux2_lora.planning.memory import Layout
from flux2_lora.planning.work import Work
from flux2_lora.quantize import PrecisionSpec

_NUMBERS_A_TOKEN, _NUMBERS_BACK = 32, 96


def drawing_layout(model: Model, precision: PrecisionSpec, vae: nn.Module, card: Card) -> Layout:
    """Which blocks stay on a card while pictures of the model's own size are drawn, room for decoding kept free."""
    room = replace(card, vram_bytes=card.vram_bytes - coding_bytes(vae, SMALL_TILE_PX**2))
    work = Work(outline=outline(model.spec), precision=precision, resolution=model.spec.resolution)
    return drawing_plan(work, room, work.costs(room))[0]


def most_at_once(needed: Callable[[int, int], int], device: torch.device, height_px: int, width_px: int) -> int:
    """How many pictures of a size can be drawn in one batch; UserError, with the largest square, where none can.

    needed: (height, width) in px -> bytes of one.
    """
    free = free_bytes(device)
    if needed(height_px, width_px) <= free:
        return free // needed(height_px, width_px)
    side, step = 0, 16
    while needed(side + step, side + step) <= free:
        side += step
    raise UserError(
        f"a picture of {width_px} x {height_px} px needs about {needed(height_px, width_px) / 1e9:.1f} GB beside the "
        f"model, and {free / 1e9:.1f} GB are free",
        f"{side} x {side} px fits; upscale enlarges it in tiles" if side else "close other programs, or use device=cpu",
    )


def needed_bytes(
    transformer: nn.Module,
    vae: nn.Module,
    device: torch.device,
    height_px: int,
    width_px: int,
    *,
    other_tokens: int,
    tile_px: int | None = None,
    backward: bool = False,
) -> int:
    """The larger of what a step and what the autoencoder holds; they do not run together.

    other_tokens: of text and references. tile_px: what the transformer sees at once, where that is not all of it.
    backward: whether a step goes back through the model, with and without the prompt.
    """
    config: Any = transformer.config
    hidden = config.num_attention_heads * config.attention_head_dim
    seen = min(height_px, tile_px or height_px) * min(width_px, tile_px or width_px)
    numbers = _NUMBERS_BACK + 2 * len(blocks_in(transformer)) if backward else _NUMBERS_A_TOKEN
    step = numbers * hidden * (seen // 256 + other_tokens) * compute_dtype(device).itemsize
    coding = coding_bytes(vae, min(height_px, SMALL_TILE_PX) * min(width_px, SMALL_TILE_PX))
    return int(max(step, coding + 12 * height_px * width_px))
