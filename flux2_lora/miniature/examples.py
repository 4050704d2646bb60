"""What the miniature's transformer is trained on: variants of every drawing as latents, and prompts as tokens.

A prompt is `subject, style`, then where the subject lies and in which inks: `red apple, noto style, mirrored, in blue`.
Some pairs of subject and style, and of place and ink, are held out.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux2_lora.families.flux2_small import FAMILY
from flux2_lora.miniature.icons import STYLES, Row, load_pictures
from flux2_lora.miniature.subjects import COMMON, SUBJECTS
from flux2_lora.miniature.vae import load_vae
from flux2_lora.miniature.variants import CANVASES, HELD_OUT, SQUARE, Variant, made, variants

MAX_TOKENS = 16
# Kinds of prompt, and how often each is drawn: full, of a style that nobody has heard of, without a style, without a
# subject, and none at all, which is what classifier-free guidance needs.
NONSENSE = 4
BEGINS = (*"bcdfghklmnprstvwz", "bl", "dr", "gr", "pl", "sk", "st", "tr")
ENDS = ("", "", "n", "m", "p", "k", "l", "st")
KINDS = (0.5, *[0.32 / NONSENSE] * NONSENSE, 0.06, 0.05, 0.07)


def texts_of(row: Row, place: str = "", ink: str = "") -> list[str]:
    """Prompts of a picture, in the order of KINDS.

    A style with a made-up name is any of the three: such a word says nothing, which leaves all to an adapter.
    """
    words = [nonsense(f"{row.label}, {row.style} {i}") for i in range(NONSENSE)]
    return [
        *(f"{row.label}, {style} style{place}{ink}" for style in (row.style, *words)),
        f"{row.label}{place}{ink}",
        f"{row.style} style{place}{ink}",
        "",
    ]


def nonsense(seed: str) -> str:
    """A word of two syllables that means nothing, the same for the same seed."""
    draw = random.Random(seed)
    return "".join(draw.choice(BEGINS) + draw.choice("aeiou") + draw.choice(ENDS) for _ in range(2))


def held_out(rows: Sequence[Row]) -> Tensor:
    """Mask [n] of the pairs of subject and style that are never trained: every 24th."""
    return torch.arange(len(rows)) % 24 == 7


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """What is trained on one canvas, on the device: latents [n c h w], tokens [n k 16], and how often [n] each."""

    latents: Tensor
    tokens: Tensor
    often: Tensor

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents [count c h w] and tokens [count 16] of random pictures and kinds of prompt."""
        picture = torch.multinomial(self.often, count, replacement=True, generator=generator)
        kind = torch.multinomial(torch.tensor(KINDS), count, True, generator=generator)
        return self.latents[picture].float(), self.tokens[picture, kind]

    def only(self, index: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Latents and the tokens of the full prompt of these pictures."""
        return self.latents[index].float(), self.tokens[index, 0]


@dataclass(frozen=True, kw_only=True)
class Examples:
    """What is trained, by canvas in the order of CANVASES; and plain pictures whose loss is told, by name."""

    canvases: list[Canvas]
    told: dict[str, tuple[Tensor, Tensor]]

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents [count c h w] and tokens [count 16] of one canvas."""
        canvas = torch.multinomial(torch.tensor(list(CANVASES.values())), 1, generator=generator)
        return self.canvases[int(canvas)].draw(count, generator)


def load_examples(work: Path, tokenizer: Any, device: torch.device) -> Examples:
    pictures, rows = load_pictures(work)
    wanted = [i for i, row in enumerate(rows) if row.style in STYLES and row.label in SUBJECTS]
    rows, pictures = [rows[i] for i in wanted], pictures[wanted]
    held = held_out(rows)
    generator = torch.Generator().manual_seed(0)
    every = {canvas: list(variants(len(rows), canvas, generator)) for canvas in CANVASES}
    latents = encoded(work, pictures, every, device, generator)
    canvases = []
    for canvas, some in every.items():
        tokens, whole = prompted(tokenizer, [texts_of(rows[one.drawing], one.place, one.ink) for one in some])
        often = [weight(rows[one.drawing], one) for one in some]
        trained = whole & ~held[[one.drawing for one in some]]
        canvases.append(
            Canvas(
                latents=latents[canvas].to(device),
                tokens=tokens.to(device),
                often=torch.tensor(often).masked_fill(~trained, 0),
            )
        )
    plain = {one.drawing: index for index, one in enumerate(every[SQUARE]) if not one.place + one.ink}
    of = {"held out": held.nonzero().flatten(), "trained": (~held).nonzero().flatten()[::24]}
    print(f"{len(rows)} drawings of {len({row.label for row in rows})} subjects, {held.sum()} held out")
    print(f"{sum(int((some.often > 0).sum()) for some in canvases)} variants", flush=True)
    return Examples(
        canvases=canvases,
        told={name: canvases[0].only([plain[i] for i in index.tolist()]) for name, index in of.items()},
    )


def weight(row: Row, one: Variant) -> float:
    """How often a variant is trained, relative to others on its canvas."""
    if (one.place, one.ink) in HELD_OUT:
        return 0.0
    return one.often * (2.0 if row.label in COMMON else 1.0)


def encoded(
    work: Path,
    drawings: Tensor,
    every: dict[tuple[int, int], list[Variant]],
    device: torch.device,
    generator: torch.Generator,
) -> dict[tuple[int, int], Tensor]:
    """Latents [n c h w] in float16 of each canvas's variants, kept in work/latents.pt for this VAE and these."""
    weights = (work / "vae/diffusion_pytorch_model.safetensors").read_bytes()
    of = hashlib.sha256(weights + drawings.numpy().tobytes() + repr(every).encode()).hexdigest()
    kept = work / "latents.pt"
    if kept.exists() and (found := torch.load(kept, weights_only=True))["of"] == of:
        latents: dict[tuple[int, int], Tensor] = found["latents"]
        return latents
    vae, latents = load_vae(work / "vae").to(device).eval(), {}
    for canvas, some in every.items():
        parts = []
        for start in range(0, len(some), 64):
            pixels = torch.stack([made(drawings[one.drawing], one, generator) for one in some[start : start + 64]])
            with torch.no_grad():
                parts.append(FAMILY.encode_pixels(vae, pixels.to(device)).mean.half().cpu())
        latents[canvas] = torch.cat(parts)
    torch.save({"of": of, "latents": latents}, kept)
    return latents


def prompted(tokenizer: Any, texts: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
    """Token ids [n k 16] of each picture's prompts, and whether its full prompt fits [n].

    A prompt that is cut off would not say what is drawn; it becomes the empty one, which is the last.
    """
    flat = [text for kinds in texts for text in kinds]
    padded = tokenizer(flat, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    ids = padded["input_ids"].view(len(texts), -1, MAX_TOKENS)
    whole = (torch.tensor(tokenizer(flat, return_length=True)["length"]) <= MAX_TOKENS).view(len(texts), -1)
    return torch.where(whole[..., None], ids, ids[:, -1:]), whole[:, 0]
