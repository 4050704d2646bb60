"""What the miniature's transformer is trained on: prints of every drawing as latents, and prompts as tokens.

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
from flux2_lora.miniature.variants import CANVASES, COPIES, Print, printed, prints

MAX_TOKENS = 16
# Kinds of prompt, and how often each is drawn: full, of a style that nobody has heard of, without a style, without a
# subject, and none at all, which is what classifier-free guidance needs.
NONSENSE = 2
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
    """What is trained on one canvas, all on one device: latents [n c h w], tokens [n k 16], and how often [n] each."""

    latents: Tensor
    tokens: Tensor
    often: Tensor

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents [count c h w] and tokens [count 16] of random pictures and kinds of prompt."""
        picture = torch.multinomial(self.often, count, replacement=True, generator=generator)
        kinds = torch.tensor(KINDS, device=self.often.device)
        kind = torch.multinomial(kinds, count, replacement=True, generator=generator)
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
        [canvas] = random.Random(generator.initial_seed()).choices(self.canvases, list(CANVASES.values()))
        return canvas.draw(count, generator)


def load_examples(work: Path, tokenizer: Any, device: torch.device, *, focused: bool) -> Examples:
    """focused: only drawings of SUBJECTS, the common ones most, half as many prints, and more as they were drawn."""
    pictures, rows = load_pictures(work)
    wanted = [i for i, row in enumerate(rows) if row.style in STYLES]
    rows, pictures = [rows[i] for i in wanted], pictures[wanted]
    held = held_out(rows)
    if focused:
        subjects = torch.tensor([row.label in SUBJECTS for row in rows])
        rows = [row for row in rows if row.label in SUBJECTS]
        pictures, held = pictures[subjects], held[subjects]
    draw = random.Random(0)
    every = {
        canvas: list(prints(len(rows), canvas, COPIES[canvas] // (2 if focused else 1), draw)) for canvas in CANVASES
    }
    latents = encoded(work, pictures.to(device), every, device)
    canvases = []
    for canvas, some in every.items():
        texts = [texts_of(rows[i], one.place, one.ink) for one in some for i in one.drawings]
        tokens, whole = prompted(tokenizer, texts)
        often = torch.tensor([weight(rows[i], one, focused=focused) for one in some for i in one.drawings])
        trained = whole & ~held[[i for one in some for i in one.drawings]]
        canvases.append(
            Canvas(
                latents=latents[canvas].to(device),
                tokens=tokens.to(device),
                often=often.masked_fill(~trained, 0).to(device),
            )
        )
    subjects = torch.tensor([row.label in SUBJECTS for row in rows])
    of = {"held out": (subjects & held).nonzero().flatten(), "trained": (subjects & ~held).nonzero().flatten()[::24]}
    print(f"{len(rows)} drawings of {len({row.label for row in rows})} subjects, {held.sum()} held out")
    print(f"{sum(int((some.often > 0).sum()) for some in canvases)} prints", flush=True)
    return Examples(
        canvases=canvases,
        told={name: canvases[0].only(index.tolist()) for name, index in of.items()},
    )


def weight(row: Row, one: Print, *, focused: bool) -> float:
    """How often a print is trained, relative to others."""
    if focused:
        return (6.0 if row.label in COMMON else 1.0) * (1.0 if one.place or one.ink else 2.0)
    return 4.0 if row.label in COMMON else 2.0 if row.label in SUBJECTS else 1.0


def encoded(
    work: Path, drawings: Tensor, every: dict[tuple[int, int], list[Print]], device: torch.device
) -> dict[tuple[int, int], Tensor]:
    """Latents [n c h w] in float16 of each canvas's prints, kept in work for this VAE and these."""
    made_of = hashlib.sha256((work / "vae/diffusion_pytorch_model.safetensors").read_bytes())
    made_of.update(drawings.cpu().numpy().tobytes())
    vae, latents = load_vae(work / "vae").to(device).eval(), {}
    for canvas, some in every.items():
        of = hashlib.sha256(made_of.digest() + repr(some).encode()).hexdigest()
        kept = work / f"latents-{'x'.join(map(str, canvas))}.pt"
        if kept.exists() and (found := torch.load(kept, weights_only=True))["of"] == of:
            latents[canvas] = found["latents"]
            continue
        with torch.no_grad():
            parts = [FAMILY.encode_pixels(vae, printed(drawings, one)).mean.half().cpu() for one in some]
        latents[canvas] = torch.cat(parts)
        torch.save({"of": of, "latents": latents[canvas]}, kept)
    return latents


def prompted(tokenizer: Any, texts: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
    """Token ids [n k 16] of each picture's prompts, and whether its full prompt fits [n].

    A prompt that does not fit becomes the empty one, which is the last: cut off, it would not say what is drawn.
    """
    flat = tokenizer([text for kinds in texts for text in kinds], verbose=False)["input_ids"]
    of, empty = len(texts[0]), flat[-1]
    fitting = [ids if len(ids) <= MAX_TOKENS else empty for ids in flat]
    padded = torch.tensor([ids + [tokenizer.pad_token_id] * (MAX_TOKENS - len(ids)) for ids in fitting])
    return padded.view(-1, of, MAX_TOKENS), torch.tensor([len(ids) <= MAX_TOKENS for ids in flat[::of]])
