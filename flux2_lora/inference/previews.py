"""Previews during training: what the adapter draws now, beside what the base drew and what it drew before.

Made from prompts encoded beforehand, with the transformer that is being trained. Nothing of it is disturbed: no global
random number is drawn, no parameter of it is moved or cast, and the adapter is as it was. Between previews nothing of
theirs is on the device: texts and autoencoder wait in host memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from flux2_lora.buckets import bucket_for
from flux2_lora.conditioning import Conditioning
from flux2_lora.dataset import Record
from flux2_lora.dataset.pictures import crop_to, open_picture
from flux2_lora.families import ModelFamily
from flux2_lora.inference.drawn import (
    EDITS,
    Edit,
    Texts,
    drawn_steps,
    edit_files,
    forget_steps,
    spread,
    step_folder,
    write_texts,
    write_thumbnails,
)
from flux2_lora.inference.edit import Border, extend
from flux2_lora.inference.grid import Section, draw_grid
from flux2_lora.inference.pack import save_picture, write_pack
from flux2_lora.inference.pictures import decoded, to_pictures
from flux2_lora.inference.sampling import Prompted, Recipe, generate, initial_noise
from flux2_lora.inference.settings import Settings
from flux2_lora.inference.starts import draw_from, under_mask
from flux2_lora.options import option
from flux2_lora.samplers import USUAL, Filling
from flux2_lora.training.encoding import Encoder

_MOST_COLUMNS, _LEAST_STRIP, _MOST_STRIP = 5, 4, 6
_MOST_THUMBNAILS, _THUMBNAIL_PX = 24, 256
EDITED = len(EDITS)  # rows that edit a picture


@dataclass(frozen=True, kw_only=True)
class PreviewSpec:
    """every: steps between previews (0: none); prompts: rows, empty for captions of the pictures; edits: edit rows.

    fill: of the masks of edit rows.
    """

    every: int = option(100, at_least=0)
    prompts: list[str] = field(default_factory=list)
    negative_prompt: str = ""
    count: int = option(4, at_least=1, at_most=32)
    steps: int = option(20, at_least=1)
    cfg_scale: float = option(1.0, at_least=0)
    guidance: float | None = option(None, at_least=0)
    edits: bool = True
    fill: Filling = USUAL

    @property
    def recipe(self) -> Recipe:
        """How a picture of a preview is drawn; each has a seed of its own."""
        return Recipe(
            negative_prompt=self.negative_prompt,
            steps=self.steps,
            guidance=self.guidance,
            cfg_scale=self.cfg_scale,
        )


@dataclass(frozen=True, kw_only=True)
class PreviewSet:
    """The prompts as rows, one picture to edit, and some that are learned from.

    texts of n, conditioning of n, negative of 1, on the host; training: thumbnails, at most 256 px a side.
    """

    texts: list[str]
    conditioning: Conditioning
    negative: Conditioning
    height_px: int
    width_px: int
    edited: Image.Image
    edited_text: str
    edited_conditioning: Conditioning
    training: list[Image.Image]


def preview_set(
    spec: PreviewSpec,
    prompts: Sequence[str],
    encoder: Encoder,
    held_out: Sequence[Record],
    training: Sequence[Record],
    side: int,
) -> PreviewSet:
    """The prompts of `spec`, else `prompts`, else the captions of the first records; the first record is edited.

    Records that are held out come first. side: px of the square that is drawn.
    """
    records = [*held_out, *training]
    texts = (list(spec.prompts) or list(prompts) or [record.caption for record in records])[: spec.count]
    edited = next((record for record in records if record.caption in texts), records[0])
    keys = encoder.encode_texts([*texts, spec.negative_prompt, edited.caption])
    height, width = bucket_for(side, side, side, encoder.model.family.pixels_per_token)

    def encoded(*of: str) -> Conditioning:
        return encoder.conditioning([keys[text] for text in of]).to(torch.device("cpu"), torch.float32)

    return PreviewSet(
        texts=texts,
        conditioning=encoded(*texts),
        negative=encoded(spec.negative_prompt),
        height_px=height,
        width_px=width,
        edited=to_pictures(crop_to(open_picture(edited.path).image, height, width)[None])[0],
        edited_text=edited.caption,
        edited_conditioning=encoded(edited.caption),
        training=[_thumbnail(record) for record in spread(training, _MOST_THUMBNAILS)] if spec.every else [],
    )


@dataclass(frozen=True, kw_only=True)
class Preview:
    """The grid's file, and what was drawn from the prompts: files, and their latents [n c h w]."""

    grid: Path
    pictures: Sequence[Path]
    latents: Tensor


@dataclass(frozen=True)
class Previewer:
    """Draws previews of one run into `folder`, as `drawn` names them; at step 0 it clears what lies there.

    vae: in host memory, where it is put back; device: where pictures are drawn.
    settings: of the first prompt's picture by the run's export, which is what the adapter is at the step `last`;
    at_once: pictures a batch; as many as training has in one, and previews need less memory than a step.
    """

    family: ModelFamily
    vae: nn.Module
    spec: PreviewSpec
    scene: PreviewSet
    folder: Path
    title: str
    device: torch.device
    settings: Settings
    last: int
    at_once: int = 1

    def draw(self, transformer: nn.Module, step: int) -> Preview:
        """Sample every row, save the pictures and the grid."""
        with _brought(self.vae, self.device):
            return self._draw(transformer, step)

    def _draw(self, transformer: nn.Module, step: int) -> Preview:
        if step == 0:
            forget_steps(self.folder)
        here, edits = step_folder(self.folder, step), self._edits()
        here.mkdir(parents=True, exist_ok=True)
        self._tell(edits)
        latents = self._from_prompts(transformer)
        pictures = [here / f"{index:04d}.png" for index in range(len(latents))]
        settings = self._settings(step)
        for seed, (file, picture) in enumerate(zip(pictures, decoded(self.family, self.vae, latents), strict=True)):
            save_picture(picture, file, replace(settings, prompt=self.scene.texts[seed], seed=seed))
        write_pack(here, settings)
        sections = [self._progress(step)]
        if self.scene.training:
            sections.append(self._strip(len(sections[0].columns)))
        if edits:
            sections.append(self._edited(transformer, edits, here))
        grid = here.with_suffix(".png")
        large = min(self.scene.height_px, self.scene.width_px) >= _THUMBNAIL_PX
        draw_grid(f"{self.title}, step {step}", sections, _THUMBNAIL_PX if large else 128).save(grid)
        return Preview(grid=grid, pictures=pictures, latents=latents)

    def _settings(self, step: int) -> Settings:
        """The base draws at step 0; a step before the last names the file that an export of its checkpoint would be."""
        (file, strength), *_ = self.settings.adapters
        path = Path(file)
        if 0 < step < self.last:
            path = path.with_stem(f"{path.stem}-step-{step:06d}")
        adapters = ((str(path), strength),) if step else ()
        return replace(self.settings, prompt=self.scene.texts[0], adapters=adapters)

    def _tell(self, edits: Mapping[str, Edit]) -> None:
        """Save what stays the same at every step: texts, what is edited, what is learned from."""
        write_texts(self.folder, Texts(prompts=self.scene.texts, edited=self.scene.edited_text))
        write_thumbnails(self.folder, self.scene.training)
        for name, edit in edits.items():
            picture, mask = edit_files(self.folder, name)
            edit.picture.save(picture)
            edit.mask.save(mask)

    def _from_prompts(self, transformer: nn.Module) -> Tensor:
        scene = self.scene
        noise = initial_noise(self.family, scene.height_px, scene.width_px, range(len(scene.texts))).to(self.device)
        parts = [slice(start, start + self.at_once) for start in range(0, len(noise), self.at_once)]
        drawn = [
            generate(self.family, transformer, self._prompted(scene.conditioning[part]), noise[part], self.spec.steps)
            for part in parts
        ]
        return torch.cat(drawn)

    def _progress(self, step: int) -> Section:
        """Prompts as rows; the base, some earlier steps and now as columns."""
        shown = spread([s for s in drawn_steps(self.folder) if s <= step], _MOST_COLUMNS)
        heads = ["base" if s == 0 else f"step {s}" for s in shown]
        rows: list[tuple[str, Sequence[Image.Image | None]]] = [
            (text, [_drawn(step_folder(self.folder, s) / f"{index:04d}.png") for s in shown])
            for index, text in enumerate(self.scene.texts)
        ]
        return Section(columns=heads, rows=rows)

    def _strip(self, columns: int) -> Section:
        """Pictures that are learned from, so that likeness is seen; about as many as there are columns."""
        few = min(max(columns, _LEAST_STRIP), _MOST_STRIP)
        return Section(columns=[], rows=[("training pictures", self.scene.training[:few])])

    def _edits(self) -> dict[str, Edit]:
        """Two ways to repaint the picture: its middle, and its right half as if it had never been there."""
        if not self.spec.edits:
            return {}
        picture = self.scene.edited
        half = picture.width // 2 // self.family.pixels_per_token * self.family.pixels_per_token
        left = picture.crop((0, 0, half, picture.height))
        _, new = extend(left, Border(right=picture.width - half))
        inner = Edit(picture=picture, mask=_middle_hole(picture))
        return dict(zip(EDITS, (inner, Edit(picture=left, mask=new)), strict=True))

    def _edited(self, transformer: nn.Module, edits: Mapping[str, Edit], here: Path) -> Section:
        """Repaint, save the results and show them."""
        rows = []
        for name, edit in edits.items():
            canvas, _ = extend(edit.picture, Border(right=edit.mask.width - edit.picture.width))
            result = self._paint(transformer, canvas, edit.mask)
            mask = edit.mask
            settings = replace(
                self._settings(int(here.name.removeprefix("step-"))),
                prompt=self.scene.edited_text,
                height=mask.height,
                width=mask.width,
                mode=name,
                strength=1.0,
                fill=self.spec.fill,
            )
            save_picture(result, here / f"{name}.png", settings)
            rows.append((f"{name}: {self.scene.edited_text}", [edit.picture, edit.mask, result]))
        return Section(columns=["picture", "mask", "result"], rows=rows)

    def _paint(self, transformer: nn.Module, picture: Image.Image, mask: Image.Image) -> Image.Image:
        prompted = self._prompted(self.scene.edited_conditioning)
        start = under_mask(picture, mask, self.family.pixels_per_token, box=(0, 0, *picture.size))
        parts = self.family, transformer, self.vae, prompted
        return draw_from(start, *parts, self.spec.steps, fill=self.spec.fill)[0]

    def _prompted(self, positive: Conditioning) -> Prompted:
        return Prompted(
            positive=positive.to(self.device, torch.float32),
            negative=self.scene.negative.to(self.device, torch.float32),
            cfg_scale=self.spec.cfg_scale,
            guidance=self.spec.guidance,
        )


@contextmanager
def _brought(module: nn.Module, device: torch.device) -> Iterator[None]:
    """While active, a module is on the device; then it is where it was, also where the device could not hold it."""
    home = next(module.parameters()).device
    try:
        module.to(device)
        yield
    finally:
        module.to(home)


def _middle_hole(picture: Image.Image) -> Image.Image:
    """A mask (255 = repaint) over the middle half of both sides."""
    mask = Image.new("L", picture.size, 0)
    quarter_w, quarter_h = picture.width // 4, picture.height // 4
    ImageDraw.Draw(mask).rectangle((quarter_w, quarter_h, 3 * quarter_w - 1, 3 * quarter_h - 1), fill=255)
    return mask


def _drawn(file: Path) -> Image.Image | None:
    """None where an earlier step had fewer prompts."""
    return Image.open(file) if file.is_file() else None


def _thumbnail(record: Record) -> Image.Image:
    picture = open_picture(record.path).image
    picture.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX), Image.Resampling.LANCZOS)
    return picture
