"""A model with its adapters, ready to draw: what the programs use, and what a user types from memory.

    from flux2_lora import Pipeline

    pipeline = Pipeline.load("outputs/demo")
    pipeline.generate("a red apple", seed=1).save("apple.png")

Pictures are Pillow's. Every method takes the options of a `Recipe` (steps, seed, cfg_scale, ...) by name; what is not
given is as the model's authors sample it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
import yaml  # type: ignore[import-untyped]
from PIL import Image
from torch import Tensor, nn

from flux2_lora.adapters import Lora, attach_loras, merge_loras, set_strengths
from flux2_lora.conditioning import Conditioning, stack
from flux2_lora.devices import pick_device
from flux2_lora.errors import UserError
from flux2_lora.families import Model, ModelFamily, ModelSpec, open_model
from flux2_lora.inference import starts
from flux2_lora.inference.edit import Border, around, border_for, extend, soften
from flux2_lora.inference.memory import drawing_layout, most_at_once, needed_bytes
from flux2_lora.inference.pictures import decoded, encoded, fit, mask_of
from flux2_lora.inference.sampling import Prompted, Recipe, generate, initial_noise, split_to_fit
from flux2_lora.inference.starts import Start
from flux2_lora.lora_files import read_loras
from flux2_lora.options import from_mapping
from flux2_lora.planning.hardware import HardwareSpec, card_of
from flux2_lora.quantize import PrecisionSpec, load_frozen, trial_of
from flux2_lora.samplers import SAMPLERS, USUAL, Filling
from flux2_lora.training.memory import MemorySpec, compile_blocks, recompute_blocks
from flux2_lora.training.progress import console

_LARGEST_REFERENCE = 1024 * 1024  # px


@dataclass(kw_only=True)
class Pipeline:
    """adapters: names in the order of their files; recipe: what a call does not say. See `load` and `open`."""

    model: Model
    transformer: nn.Module
    vae: nn.Module
    adapters: list[str]
    device: torch.device
    recipe: Recipe
    _texts: dict[str, Conditioning] = field(default_factory=dict)

    @classmethod
    def load(
        cls, run: str | Path, *, adapters: Sequence[str] | None = None, strength: float = 1.0, device: str = "auto"
    ) -> Pipeline:
        """The model of a run folder (outputs/<name>) with its last adapter, or with the adapters that are given.

        Raises UserError where the folder is no run, or a file does not fit the model.
        """
        settings = Path(run).expanduser() / "run.yaml"
        if not settings.is_file():
            raise UserError(f"{run} is not the folder of a run: it has no run.yaml", "give outputs/<name>")
        resolved = yaml.safe_load(settings.read_text(encoding="utf-8"))
        model = open_model(from_mapping(ModelSpec, resolved["model"]))
        precision = from_mapping(PrecisionSpec, resolved["precision"])
        memory = replace(from_mapping(MemorySpec, resolved.get("memory", {})), compile=False)
        loras = read_loras([str(run)] if adapters is None else list(adapters), model)
        pipeline = cls.open(model, precision, loras, pick_device(device), memory=memory)
        pipeline.use([strength] * len(pipeline.adapters))
        return pipeline

    @classmethod
    def open(
        cls,
        model: Model,
        precision: PrecisionSpec,
        loras: Mapping[str, Lora],
        device: torch.device,
        *,
        prompts: Iterable[str] = (),
        memory: MemorySpec | None = None,
    ) -> Pipeline:
        """Encode the prompts that are known, drop the text encoders, then load transformer and VAE and attach.

        memory: what of the base stays on the device; what it leaves open is chosen for a card, and elsewhere all stays.
        """
        texts, memory = _encode(model, prompts, device), memory or MemorySpec()
        vae, layout = model.load_vae(device), None
        if device.type == "cuda" and memory.resident_blocks is None:
            layout = drawing_layout(model, precision, vae, card_of(HardwareSpec(), device))
        transformer = load_frozen(model, precision, device, memory.placement(model.blocks(), layout))
        if (trial := trial_of(transformer)) is not None:
            console.print(trial.words)
        names = attach_loras(transformer, loras)
        recompute_blocks(transformer, memory.plain(model.blocks(), device), memory.offload(device))
        if memory.compile:
            compile_blocks(transformer)
        spec = model.spec
        recipe = Recipe(steps=spec.steps, cfg_scale=spec.cfg_scale, guidance=spec.guidance)
        return cls(
            model=model,
            transformer=transformer,
            vae=vae,
            adapters=names,
            device=device,
            recipe=recipe,
            _texts=texts,
        )

    @property
    def family(self) -> ModelFamily:
        """The model's family."""
        return self.model.family

    def use(self, strengths: Sequence[float]) -> None:
        """Set one strength an adapter; all 0 is the base bit for bit."""
        set_strengths(self.transformer, dict(zip(self.adapters, strengths, strict=True)))

    def merge(self, strengths: Sequence[float]) -> None:
        """Fold the adapters into the base for good: no work of theirs is left in a step, and no strength to change."""
        merge_loras(self.transformer, dict(zip(self.adapters, strengths, strict=True)))
        self.adapters = []

    def whole_tokens(self, px: int) -> int:
        """A side rounded down to what the model can draw, at least one token."""
        step = self.family.pixels_per_token
        return max(px // step, 1) * step

    @overload
    def generate(self, prompt: str, **options: Any) -> Image.Image: ...
    @overload
    def generate(self, prompt: Sequence[str], **options: Any) -> list[Image.Image]: ...

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        height: int | None = None,
        width: int | None = None,
        image: Image.Image | None = None,
        strength: float = 0.6,
        references: Sequence[Image.Image] = (),
        **recipe: Any,
    ) -> Image.Image | list[Image.Image]:
        """Text to image, or of `image`, scaled and cropped to the size, image to image; a list gives a list.

        height, width: px, cut to whole tokens; null for the model's own. strength: how much of `image` is redrawn, in
        [0, 1]. references: pictures to look at, in families that take them. All prompts are drawn from the same seed.
        """
        side, texts = self.model.spec.resolution, [prompt] if isinstance(prompt, str) else list(prompt)
        size = self.whole_tokens(height or side), self.whole_tokens(width or side)
        if image is not None:
            start = starts.of_size(image, *size)
            pictures = self.draw_from(start, texts, strength=strength, references=references, **recipe)
        else:
            pictures = self._from_prompts(texts, size, references, replace(self.recipe, **recipe))
        return pictures[0] if isinstance(prompt, str) else pictures

    def redraw(self, image: Image.Image, prompt: str, *, strength: float = 0.6, **options: Any) -> Image.Image:
        """Image to image at the picture's own size. options: references and those of a recipe."""
        return self.draw_from(self.to_redraw(image), [prompt], strength=strength, **options)[0]

    def inpaint(
        self,
        image: Image.Image,
        mask: Image.Image,
        prompt: str,
        *,
        strength: float = 1.0,
        feather_px: int = 0,
        crop: str = "auto",
        padding_px: int = 64,
        fill: Filling = USUAL,
        **options: Any,
    ) -> Image.Image:
        """Repaint where `mask` is bright or transparent; every other pixel of `image` comes back as it was.

        A mask of another size is resized. feather_px: fade inwards over so many pixels. crop: always, never, or auto:
        work only on what lies within `padding_px` of the mask, enlarged to the area that the model draws, where the
        picture is larger than that. fill: what makes it fit better what is kept, and takes longer. options: references
        and those of a recipe.
        """
        start = self.to_inpaint(image, mask, feather_px=feather_px, crop=crop, padding_px=padding_px)
        if start is None:
            return image.convert("RGB")
        return self.draw_from(start, [prompt], strength=strength, fill=fill, **options)[0]

    def outpaint(
        self,
        image: Image.Image,
        prompt: str,
        *,
        left: int = 0,
        right: int = 0,
        top: int = 0,
        bottom: int = 0,
        ratio: float | None = None,
        **options: Any,
    ) -> Image.Image:
        """Paint a border of so many px, or what makes width / height `ratio`; every pixel of `image` is kept.

        options: those of `inpaint`.
        """
        border = Border(left=left, right=right, top=top, bottom=bottom)
        if ratio is not None:
            border = border_for(image.width, image.height, ratio)
        canvas, mask = extend(image.convert("RGB"), border)
        options.setdefault("padding_px", max(border.left, border.right, border.top, border.bottom, 64))
        return self.inpaint(canvas, mask, prompt, **options)

    def upscale(
        self, image: Image.Image, prompt: str, *, factor: float = 2.0, strength: float = 0.35, **recipe: Any
    ) -> Image.Image:
        """Enlarge, and refine from the noise level `strength` in overlapping tiles of the size that the model draws."""
        return self.draw_from(self.to_upscale(image, factor=factor), [prompt], strength=strength, **recipe)[0]

    def to_redraw(self, image: Image.Image) -> Start:
        """What `redraw` draws from."""
        return starts.whole(image, self.family.pixels_per_token)

    def to_inpaint(
        self, image: Image.Image, mask: Image.Image, *, feather_px: int = 0, crop: str = "auto", padding_px: int = 64
    ) -> Start | None:
        """What `inpaint` draws from; None for an empty mask."""
        picture = image.convert("RGB")
        drawn = soften(mask_of(mask).resize(picture.size, Image.Resampling.BILINEAR), feather_px)
        box, area, step = around(drawn, padding_px), self.model.spec.resolution**2, self.family.pixels_per_token
        if box is None:
            return None
        if crop == "never" or (crop == "auto" and picture.width * picture.height <= area):
            return starts.under_mask(picture, drawn, step, box=(0, 0, *picture.size))
        left, top, right, bottom = box
        scale = max((area / ((right - left) * (bottom - top))) ** 0.5, 1.0)
        return starts.under_mask(picture, drawn, step, box=box, scale=scale)

    def to_upscale(self, image: Image.Image, *, factor: float) -> Start:
        """What `upscale` draws from; UserError where the result would not fit in memory."""
        height, width = round(image.height * factor), round(image.width * factor)
        side, step = self.model.spec.resolution, self.family.pixels_per_token
        self._most_at_once(height, width, tile_px=side)
        return starts.enlarged(image, height, width, step, side // step)

    def draw_from(
        self,
        start: Start,
        prompts: Sequence[str],
        *,
        strength: float,
        fill: Filling = USUAL,
        references: Sequence[Image.Image] = (),
        **recipe: Any,
    ) -> list[Image.Image]:
        """A picture for each prompt. strength: how much of the start is redrawn, in [0, 1]."""
        if not 0 <= strength <= 1:
            raise UserError(f"strength={strength:g} is out of range", "give a number from 0 to 1")
        how, step = replace(self.recipe, **recipe), self.family.pixels_per_token
        looked_at = [self._latents(reference) for reference in references]
        tile_px = None if start.tile is None else start.tile * step

        def draw(part: Sequence[str]) -> list[Image.Image]:
            return starts.draw_from(
                start,
                self.family,
                self.transformer,
                self.vae,
                self._prompted(part, how, looked_at),
                how.steps,
                seed=how.seed,
                strength=strength,
                sampler=how.sampler,
                fill=fill,
            )

        self._encode(prompts, how)
        size, back = (start.height, start.width), start.region is not None and fill.reconstruction
        most = self._most_at_once(*size, tile_px=tile_px, references=looked_at, backward=back)
        return _in_parts(draw, prompts, most)

    def _from_prompts(
        self, prompts: Sequence[str], size: tuple[int, int], references: Sequence[Image.Image], how: Recipe
    ) -> list[Image.Image]:
        """Text to image at a size (height, width) of whole tokens."""
        looked_at = [self._latents(reference) for reference in references]

        def draw(part: Sequence[str]) -> list[Image.Image]:
            noise = initial_noise(self.family, *size, [how.seed]).to(self.device).expand(len(part), -1, -1, -1)
            prompted = self._prompted(part, how, looked_at)
            latents = generate(self.family, self.transformer, prompted, noise, how.steps, sampler=SAMPLERS[how.sampler])
            return decoded(self.family, self.vae, latents)

        self._encode(prompts, how)
        return _in_parts(draw, prompts, self._most_at_once(*size, references=looked_at))

    def _most_at_once(
        self,
        height_px: int,
        width_px: int,
        *,
        tile_px: int | None = None,
        references: Sequence[Tensor] = (),
        backward: bool = False,
    ) -> int:
        text = max((text.embeds.shape[1] for text in self._texts.values()), default=0)
        others = text + sum(reference[0, 0].numel() for reference in references)
        parts = self.transformer, self.vae, self.device
        needed = partial(needed_bytes, *parts, other_tokens=others, tile_px=tile_px, backward=backward)
        return most_at_once(needed, self.device, height_px, width_px)

    def _prompted(self, prompts: Sequence[str], how: Recipe, references: Sequence[Tensor] = ()) -> Prompted:
        return Prompted(
            positive=stack([self._texts[prompt] for prompt in prompts]),
            negative=self._texts[how.negative_prompt],
            cfg_scale=how.cfg_scale,
            guidance=how.guidance,
            references=references,
        )

    def encoded(self, prompt: str) -> Conditioning:
        """What the text encoders make of a prompt, of batch 1."""
        self._encode([prompt], self.recipe)
        return self._texts[prompt]

    def _encode(self, prompts: Sequence[str], how: Recipe) -> None:
        """Text encoders are loaded for prompts that are new, and dropped again."""
        self._texts |= _encode(
            self.model, [text for text in (*prompts, how.negative_prompt) if text not in self._texts], self.device
        )

    def as_seen(self, reference: Image.Image) -> Image.Image:
        """A reference as the model looks at it: of no more px than Diffusers shows, its sides whole tokens."""
        picture = reference.convert("RGB")
        shrink = min((_LARGEST_REFERENCE / (picture.width * picture.height)) ** 0.5, 1.0)
        width, height = (self.whole_tokens(int(px * shrink)) for px in picture.size)
        return fit(picture, height, width)

    def _latents(self, reference: Image.Image) -> Tensor:
        if not self.family.takes_references:
            raise UserError(
                f"{self.model.spec.title} looks at no reference pictures", "use a model of flux2_klein or flux2_dev"
            )
        return encoded(self.family, self.vae, self.as_seen(reference), self.device).mean


def _in_parts(
    draw: Callable[[Sequence[str]], list[Image.Image]], prompts: Sequence[str], most: int
) -> list[Image.Image]:
    """All pictures, in batches of at most so many, smaller where memory turns out to be short."""
    parts = [prompts[start : start + most] for start in range(0, len(prompts), most)]
    return [picture for part in parts for picture in split_to_fit(draw, part)]


def _encode(model: Model, prompts: Iterable[str], device: torch.device) -> dict[str, Conditioning]:
    distinct = list(dict.fromkeys(prompts))
    if not distinct:
        return {}
    made = model.load_prompt_encoder(device)(distinct)
    return {text: one.to(device, torch.float32) for text, one in zip(distinct, made, strict=True)}
