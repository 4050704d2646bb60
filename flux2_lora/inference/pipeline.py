"""A model with its adapters, ready to draw: what the programs use, and what a user types from memory.

    from flux2_lora import Pipeline

    pipeline = Pipeline.load("outputs/demo")
    pipeline.generate("a red apple", seed=1).save("apple.png")

Pictures are Pillow's. Every method takes the options of a `Recipe` (steps, seed, cfg_scale, ...) by name; what is not
given is as the model's authors sample it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
from flux2_lora.inference.edit import Border, around, border_for, extend, inpaint, padded, soften
from flux2_lora.inference.memory import most_at_once, needed_bytes
from flux2_lora.inference.pictures import decoded, encoded, fit, mask_of
from flux2_lora.inference.sampling import Prompted, Recipe, generate, initial_noise, split_to_fit, start_and_noise
from flux2_lora.lora_files import read_loras
from flux2_lora.options import from_mapping
from flux2_lora.quantize import PrecisionSpec, load_frozen
from flux2_lora.samplers import from_level
from flux2_lora.training.memory import MemorySpec, compile_blocks

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

        memory: what of the base stays on the device; null for all of it.
        """
        texts, memory = _encode(model, prompts, device), memory or MemorySpec()
        transformer = load_frozen(model, precision, device, memory.placement(model.blocks()))
        names = attach_loras(transformer, loras)
        if memory.compile:
            compile_blocks(transformer)
        spec = model.spec
        recipe = Recipe(steps=spec.steps, cfg_scale=spec.cfg_scale, guidance=spec.guidance)
        return cls(
            model=model,
            transformer=transformer,
            vae=model.load_vae(device),
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
        how, side = self._recipe(recipe, strength), self.model.spec.resolution
        size = self.whole_tokens(height or side), self.whole_tokens(width or side)
        looked_at = [self._latents(reference) for reference in references]
        posterior = None if image is None else encoded(self.family, self.vae, fit(image, *size), self.device)

        def draw(prompts: Sequence[str]) -> list[Image.Image]:
            start, noise = None, initial_noise(self.family, *size, [how.seed]).to(self.device)
            if posterior is not None:
                start, noise = start_and_noise(self.family, posterior, how.seed)
            latents = generate(
                self.family,
                self.transformer,
                self._prompted(prompts, how, looked_at),
                noise.expand(len(prompts), -1, -1, -1),
                how.steps,
                start=start,
                strength=strength if start is not None else 1.0,
                sampler=how.sampler,
            )
            return decoded(self.family, self.vae, latents)

        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        self._encode(texts, how)
        most = self._most_at_once(*size, references=looked_at)
        parts = [texts[start : start + most] for start in range(0, len(texts), most)]
        pictures = [picture for part in parts for picture in split_to_fit(draw, part)]
        return pictures[0] if isinstance(prompt, str) else pictures

    def redraw(self, image: Image.Image, prompt: str, **options: Any) -> Image.Image:
        """Image to image at the picture's own size. options: strength, references and those of a recipe."""
        whole = padded(image.convert("RGB"), self.family.pixels_per_token)
        drawn = self.generate(prompt, height=whole.height, width=whole.width, image=whole, **options)
        return drawn.crop((0, 0, image.width, image.height))

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
        references: Sequence[Image.Image] = (),
        **recipe: Any,
    ) -> Image.Image:
        """Repaint where `mask` is bright or transparent; every other pixel of `image` comes back as it was.

        A mask of another size is resized. feather_px: fade inwards over so many pixels. crop: always, never, or auto:
        work only on what lies within `padding_px` of the mask, enlarged to the area that the model draws, where the
        picture is larger than that.
        """
        how, picture = self._recipe(recipe, strength), image.convert("RGB")
        drawn = soften(mask_of(mask).resize(picture.size, Image.Resampling.BILINEAR), feather_px)
        box = around(drawn, padding_px)
        if box is None:
            return picture
        area = self.model.spec.resolution**2
        cropped = crop == "always" or (crop == "auto" and picture.width * picture.height > area)
        box = box if cropped else (0, 0, *picture.size)
        part, bright = picture.crop(box), drawn.crop(box)
        scale = max((area / (part.width * part.height)) ** 0.5, 1.0) if cropped else 1.0
        size = round(part.width * scale), round(part.height * scale)
        looked_at = [self._latents(reference) for reference in references]
        self._encode([prompt], how)
        self._most_at_once(size[1], size[0], references=looked_at)
        painted = inpaint(
            self.family,
            self.transformer,
            self.vae,
            self._prompted([prompt], how, looked_at),
            part.resize(size, Image.Resampling.LANCZOS),
            bright.resize(size, Image.Resampling.BILINEAR),
            how.steps,
            seed=how.seed,
            strength=strength,
            sampler=how.sampler,
        ).resize(part.size, Image.Resampling.LANCZOS)
        result = picture.copy()
        kept = bright.point(lambda value: 255 * (value > 0))
        result.paste(painted, box[:2], kept)
        return result

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
        how, side = self._recipe(recipe, strength), self.family.pixels_per_token
        size = round(image.width * factor), round(image.height * factor)
        self._encode([prompt], how)
        self._most_at_once(size[1], size[0], tile_px=self.model.spec.resolution)
        large = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        posterior = encoded(self.family, self.vae, padded(large, side), self.device)
        start, noise = start_and_noise(self.family, posterior, how.seed)
        latents = generate(
            self.family,
            self.transformer,
            self._prompted([prompt], how),
            noise,
            how.steps,
            start=start,
            sampler=how.sampler,
            sigmas=from_level(how.steps, strength),
            tile=self.model.spec.resolution // side,
        )
        return decoded(self.family, self.vae, latents)[0].crop((0, 0, *size))

    def _most_at_once(
        self, height_px: int, width_px: int, *, tile_px: int | None = None, references: Sequence[Tensor] = ()
    ) -> int:
        text = max(text.embeds.shape[1] for text in self._texts.values())
        others = text + sum(reference[0, 0].numel() for reference in references)
        parts = self.transformer, self.vae, self.device
        needed = partial(needed_bytes, *parts, other_tokens=others, tile_px=tile_px)
        return most_at_once(needed, self.device, height_px, width_px)

    def _recipe(self, changes: Mapping[str, Any], strength: float) -> Recipe:
        if not 0 <= strength <= 1:
            raise UserError(f"strength={strength:g} is out of range", "give a number from 0 to 1")
        return replace(self.recipe, **changes)

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

    def _latents(self, reference: Image.Image) -> Tensor:
        if not self.family.takes_references:
            raise UserError(
                f"{self.model.spec.title} looks at no reference pictures", "use a model of flux2_klein or flux2_dev"
            )
        picture = reference.convert("RGB")
        shrink = min((_LARGEST_REFERENCE / (picture.width * picture.height)) ** 0.5, 1.0)  # as Diffusers does
        width, height = (self.whole_tokens(int(px * shrink)) for px in picture.size)
        return encoded(self.family, self.vae, fit(picture, height, width), self.device).mean


def _encode(model: Model, prompts: Iterable[str], device: torch.device) -> dict[str, Conditioning]:
    distinct = list(dict.fromkeys(prompts))
    if not distinct:
        return {}
    made = model.load_prompt_encoder(device)(distinct)
    return {text: one.to(device, torch.float32) for text, one in zip(distinct, made, strict=True)}
