"""Previews during training: what the adapter draws now, beside what the base drew and what it drew before.

Made from prompts encoded beforehand, with the transformer that is being trained. Nothing of it is disturbed: no global
random number is drawn, no parameter is moved or cast, and the adapter is as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from flux2_lora.buckets import bucket_for
from flux2_lora.conditioning import Conditioning
from flux2_lora.dataset import Record
from flux2_lora.dataset.pictures import crop_to, open_picture
from flux2_lora.families import ModelFamily
from flux2_lora.inference.edit import Border, extend, inpaint
from flux2_lora.inference.grid import Section, draw_grid
from flux2_lora.inference.pictures import to_pictures
from flux2_lora.inference.sampling import Prompted, generate, initial_noise
from flux2_lora.options import option
from flux2_lora.training.encoding import Encoder

_MOST_COLUMNS = 5


@dataclass(frozen=True, kw_only=True)
class PreviewSpec:
    """every: steps between previews (0: none); prompts: rows, empty for captions of the pictures; edits: edit rows."""

    every: int = option(100, at_least=0)
    prompts: list[str] = field(default_factory=list)
    negative_prompt: str = ""
    count: int = option(4, at_least=1, at_most=32)
    steps: int = option(20, at_least=1)
    cfg_scale: float = option(1.0, at_least=0)
    guidance: float | None = option(None, at_least=0)
    edits: bool = True


@dataclass(frozen=True, kw_only=True)
class PreviewSet:
    """The prompts as rows, and one picture to edit. texts of n, conditioning of n, negative of 1."""

    texts: list[str]
    conditioning: Conditioning
    negative: Conditioning
    height_px: int
    width_px: int
    edited: Image.Image
    edited_conditioning: Conditioning


def preview_set(
    spec: PreviewSpec, prompts: Sequence[str], encoder: Encoder, records: Sequence[Record], side: int
) -> PreviewSet:
    """The prompts of `spec`, else `prompts`, else the captions of the first records; the first record is edited.

    side: px of the square that is drawn.
    """
    texts = (list(spec.prompts) or list(prompts) or [record.caption for record in records])[: spec.count]
    edited = next((record for record in records if record.caption in texts), records[0])
    keys = encoder.encode_texts([*texts, spec.negative_prompt, edited.caption])
    height, width = bucket_for(side, side, side, encoder.model.family.pixels_per_token)

    def encoded(*of: str) -> Conditioning:
        return encoder.conditioning([keys[text] for text in of]).to(encoder.device, torch.float32)

    return PreviewSet(
        texts=texts,
        conditioning=encoded(*texts),
        negative=encoded(spec.negative_prompt),
        height_px=height,
        width_px=width,
        edited=to_pictures(crop_to(open_picture(edited.path).image, height, width)[None])[0],
        edited_conditioning=encoded(edited.caption),
    )


@dataclass(frozen=True, kw_only=True)
class Preview:
    """The grid's file, and what was drawn from the prompts: files, and their latents [n c h w]."""

    grid: Path
    pictures: Sequence[Path]
    latents: Tensor


@dataclass(frozen=True)
class Previewer:
    """Draws previews of one run into `folder`: step-000100.png, and its pictures in step-000100/."""

    family: ModelFamily
    vae: nn.Module
    spec: PreviewSpec
    scene: PreviewSet
    folder: Path
    title: str
    device: torch.device

    def draw(self, transformer: nn.Module, step: int) -> Preview:
        """Sample every row, save the pictures and the grid."""
        here = self.folder / f"step-{step:06d}"
        here.mkdir(parents=True, exist_ok=True)
        latents = self._from_prompts(transformer)
        for index, picture in enumerate(to_pictures(self.family.decode_latents(self.vae, latents))):
            picture.save(here / f"{index:04d}.png")
        pictures = [here / f"{index:04d}.png" for index in range(len(latents))]
        sections = [self._progress(step)]
        if self.spec.edits:
            sections.append(self._edits(transformer))
        grid = here.with_suffix(".png")
        draw_grid(f"{self.title}, step {step}", sections).save(grid)
        return Preview(grid=grid, pictures=pictures, latents=latents)

    def _from_prompts(self, transformer: nn.Module) -> Tensor:
        scene = self.scene
        noise = initial_noise(self.family, scene.height_px, scene.width_px, range(len(scene.texts)))
        return generate(
            self.family, transformer, self._prompted(scene.conditioning), noise.to(self.device), self.spec.steps
        )

    def _progress(self, step: int) -> Section:
        """Prompts as rows; the base, some earlier steps and now as columns."""
        steps = sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*") if path.is_dir())
        shown = _spread([s for s in steps if s <= step], _MOST_COLUMNS)
        heads = ["base" if s == 0 else f"step {s}" for s in shown]
        rows: list[tuple[str, Sequence[Image.Image]]] = [
            (text, [Image.open(self.folder / f"step-{s:06d}" / f"{index:04d}.png") for s in shown])
            for index, text in enumerate(self.scene.texts)
        ]
        return Section(columns=heads, rows=rows)

    def _edits(self, transformer: nn.Module) -> Section:
        picture = self.scene.edited
        hole = _middle_hole(picture)
        half = picture.width // 2 // self.family.pixels_per_token * self.family.pixels_per_token
        left = picture.crop((0, 0, half, picture.height))
        canvas, new = extend(left, Border(right=picture.width - half))
        rows = [
            ("inpaint", [picture, hole, self._paint(transformer, picture, hole)]),
            ("outpaint", [left, new, self._paint(transformer, canvas, new)]),
        ]
        return Section(columns=["picture", "mask", "result"], rows=rows)

    def _paint(self, transformer: nn.Module, picture: Image.Image, mask: Image.Image) -> Image.Image:
        prompted = self._prompted(self.scene.edited_conditioning)
        return inpaint(self.family, transformer, self.vae, prompted, picture, mask, self.spec.steps)

    def _prompted(self, positive: Conditioning) -> Prompted:
        return Prompted(
            positive=positive,
            negative=self.scene.negative,
            cfg_scale=self.spec.cfg_scale,
            guidance=self.spec.guidance,
        )


def _middle_hole(picture: Image.Image) -> Image.Image:
    """A mask (255 = repaint) over the middle half of both sides."""
    mask = Image.new("L", picture.size, 0)
    quarter_w, quarter_h = picture.width // 4, picture.height // 4
    ImageDraw.Draw(mask).rectangle((quarter_w, quarter_h, 3 * quarter_w - 1, 3 * quarter_h - 1), fill=255)
    return mask


def _spread(steps: Sequence[int], most: int) -> list[int]:
    """At most `most` of the steps, evenly spread, first and last included."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]
