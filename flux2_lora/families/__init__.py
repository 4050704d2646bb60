"""All that differs between models, behind one Protocol. A new family is one file here and one YAML in configs/model.

Each module of this package ends with `FAMILY`, an object that satisfies `ModelFamily`; `load_family` finds it by name.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flux2_lora.conditioning import Conditioning
from flux2_lora.errors import UserError, did_you_mean
from flux2_lora.keys import is_target
from flux2_lora.latents import Posterior
from flux2_lora.networks.components import TextEncoders, check_widths, empty_autoencoder, load_autoencoder, on_meta
from flux2_lora.networks.prompts import LONGEST
from flux2_lora.networks.text import PromptEncoder
from flux2_lora.networks.transformers import blocks_of, empty_transformer, open_transformer
from flux2_lora.options import option
from flux2_lora.samplers import USUAL, Filling
from flux2_lora.sources import ModelFiles, check_class, check_folders, check_parts, is_distilled, locate
from flux2_lora.weights import Weights, open_file, read_json


@dataclass(frozen=True, kw_only=True)
class TrainingDefaults:
    """What a run on this model uses where the user says nothing."""

    max_steps: int = 1000
    batch_size: int = 1
    rank: int = 16
    lr: float = 1e-4


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """A transformer's shape in Diffusers' own words; what is not said here is the same in all models of its class.

    companions_gb: text encoders and VAE as they are released.
    """

    num_layers: int = option(1, at_least=1)
    num_single_layers: int = option(1, at_least=1)
    num_attention_heads: int = option(1, at_least=1)
    joint_attention_dim: int = option(1, at_least=1)
    guidance_embeds: bool = False
    companions_gb: float = option(0.0, at_least=0)

    @property
    def config(self) -> dict[str, Any]:
        """What the transformer is built with."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "companions_gb"}


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model: its family, where it lies, and how its authors sample it.

    path: a Diffusers folder, a hub id, or a file of the transformer; components: a folder or hub id with the rest, for
    a path that holds the transformer alone. title: as file managers show it; architecture_name: as ModelSpec headers
    spell it. fill: of masks in previews. max_sequence_length: tokens of a prompt, null for the family's own. distilled:
    made for few steps, to be sampled and not trained; train_distilled trains it all the same. base_prompts: what it
    draws in styles of its own. licence: as the hub spells it. geometry: of the model under `path` while it is not on
    this machine, for plans.
    """

    family: str
    path: str
    title: str
    architecture_name: str
    components: str | None = None
    resolution: int = 1024
    steps: int = 50
    cfg_scale: float = 1.0
    fill: Filling = USUAL
    guidance: float | None = None
    max_sequence_length: int | None = option(None, at_least=1, at_most=512)
    licence: str | None = None
    distilled: bool = False
    train_distilled: bool = False
    base_prompts: list[str] = field(
        default_factory=lambda: [
            "a photo of a street market in the rain",
            "a portrait photo of an old man with a beard",
            "a watercolour painting of a lighthouse",
            "a bowl of fruit on a wooden table, studio light",
        ]
    )
    geometry: Geometry = field(default_factory=Geometry)
    training: TrainingDefaults = field(default_factory=TrainingDefaults)


class ModelFamily(Protocol):
    """One model architecture with its text encoders and VAE: all that differs between models, and nothing else.

    latents: [b c h w] with h, w in tokens; pixels: [b 3 H W] in [-1, 1] with H, W multiples of `pixels_per_token`.
    """

    @property
    def name(self) -> str: ...

    @property
    def architecture(self) -> str:
        """Row of flux2_lora.keys that names this transformer's weights."""

    @property
    def transformer_class(self) -> str:
        """Diffusers' class of the transformer."""

    @property
    def vae_class(self) -> str:
        """Diffusers' class of the autoencoder."""

    @property
    def text(self) -> TextEncoders: ...

    @property
    def latent_channels(self) -> int: ...

    @property
    def pixels_per_token(self) -> int: ...

    @property
    def samples_posterior(self) -> bool:
        """Whether the base was trained on latents drawn from the VAE's posterior, and not on its mean."""

    @property
    def takes_references(self) -> bool:
        """Whether the base was trained to look at pictures beside the prompt."""

    def configuration(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """What the transformer is built with, read off its tensors, for files that carry no configuration."""

    def encode_pixels(self, vae: nn.Module, pixels: Tensor) -> Posterior:
        """Pixels -> normalised latents, as the VAE's posterior; its mean is the picture's own."""

    def decode_latents(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Normalised latents -> pixels, clamped to [-1, 1]."""

    def draw_noise(self, height: int, width: int, stream: torch.Generator) -> Tensor:
        """Standard normal latents [1 c height width], in the order in which the family's Diffusers pipeline draws."""

    def velocity(
        self,
        transformer: nn.Module,
        latents: Tensor,
        sigmas: Tensor,
        conditioning: Conditioning,
        guidance: float | None = None,
        references: Sequence[Tensor] = (),
    ) -> Tensor:
        """d latents / d sigma at noise levels sigmas [b] in [0, 1]; same shape as latents.

        references: latents [1 c h w] of pictures to look at, of any sizes, where the family `takes_references`.
        """

    def training_mu(self, tokens: int) -> float:
        """Shift exponent of the training density for a picture of `tokens` packed tokens."""

    def inference_mu(self, transformer: nn.Module, tokens: int, steps: int) -> float:
        """Shift exponent of the sampling schedule."""


@dataclass(frozen=True)
class Model:
    """A model that was found and checked: nothing of it is in memory but the headers of its files."""

    spec: ModelSpec
    family: ModelFamily
    files: ModelFiles
    weights: Weights

    def empty_transformer(self) -> nn.Module:
        """The transformer on the meta device; UserError unless `weights` has exactly its tensors."""
        family = self.family
        return empty_transformer(self.files, family.transformer_class, self.weights, family.configuration)

    def projections(self) -> list[str]:
        """The Linears that may carry an adapter, read off the names of the weights: the N of "N of N"."""
        linears = [name.removesuffix(".weight") for name in self.weights.shapes if name.endswith(".weight")]
        return [name for name in linears if is_target(self.family.architecture, name)]

    def blocks(self) -> int:
        """How many blocks the transformer has, double and single ones."""
        kinds = ("transformer_blocks", "single_transformer_blocks")
        return sum(blocks_of(self.weights.shapes, kind) for kind in kinds)

    def load_vae(self, device: torch.device) -> nn.Module:
        """The frozen autoencoder, float32."""
        return load_autoencoder(self.family.vae_class, self.files, self.family.latent_channels, device)

    def load_prompt_encoder(self, device: torch.device) -> PromptEncoder:
        """Prompts -> conditionings; drop it to free what it holds."""
        return self.family.text.load(self.files.components, device, self.spec.max_sequence_length)

    def takes_guidance(self) -> bool:
        """Whether the transformer has a guidance embedding."""
        return any(".guidance_embedder." in name for name in self.weights.shapes)


def open_model(spec: ModelSpec, *, to_train: bool = False) -> Model:
    """Find a model, or fetch it, and check all of it before any of it is loaded; UserError for what does not fit.

    Reads configurations and headers only: all parts are there, of this family, whole, and fit together. to_train: a
    base that was distilled to a few steps is refused unless the user insists, before it is fetched where possible.
    """
    family = load_family(spec.family)
    if to_train and spec.distilled:
        _refuse_distilled(spec)
    parts = parts_of(family)
    files = locate(spec.path, spec.components, list(parts))
    check_folders(files, list(parts), family.name)
    if to_train and is_distilled(files):
        _refuse_distilled(spec)
    weights = open_transformer(files, family.transformer_class, family.architecture, family.name)
    check_parts(files, parts, family.name)
    check_widths(files, weights, family.latent_channels, family.text)
    model = Model(spec, family, files, weights)
    model.empty_transformer()
    empty_autoencoder(family.vae_class, files, family.latent_channels)
    family.text.check(files.components)
    return model


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A model by its shape alone. config: what its transformer is built with; released_bytes: of all its files.

    text_tokens: what a prompt is padded to.
    """

    family: ModelFamily
    config: Mapping[str, Any]
    released_bytes: int
    text_tokens: int = LONGEST

    def sketch(self, **changes: int) -> nn.Module:
        """The transformer on the meta device, with some of its configuration changed."""
        return on_meta(self.family.transformer_class, {**self.config, **changes}, "model.geometry")


def outline(spec: ModelSpec) -> Outline:
    """What `model.path` holds where it is a file or a folder here, else what `model.geometry` says; fetches nothing.

    UserError where neither says anything.
    """
    family, place = load_family(spec.family), Path(spec.path).expanduser()
    tokens = spec.max_sequence_length or LONGEST
    companions = int(1e9 * spec.geometry.companions_gb)
    if place.is_file():
        config = family.configuration(open_file(place, family.architecture).shapes)
        size = place.stat().st_size + companions
        return Outline(family=family, config=config, released_bytes=size, text_tokens=tokens)
    if place.is_dir():
        check_class(place / "transformer", [family.transformer_class], family.name)
        config = read_json(place / "transformer" / "config.json")
        size = sum(file.stat().st_size for file in place.rglob("*.safetensors"))
        pages = [read_json(page) for page in place.glob("tokenizer*/tokenizer_config.json")]
        tokens = spec.max_sequence_length or max((_tokens(page) for page in pages), default=LONGEST)
        return Outline(family=family, config=config, released_bytes=size, text_tokens=tokens)
    if spec.geometry == Geometry():
        raise UserError(
            f"model.path={spec.path} is not on this computer, and nothing says what shape it has",
            "give a folder or a file that is here, or model.geometry.num_layers=... and its neighbours",
        )
    drawn = Outline(family=family, config=spec.geometry.config, released_bytes=0, text_tokens=tokens)
    weights = 2 * sum(parameter.numel() for parameter in drawn.sketch().parameters())
    return replace(drawn, released_bytes=weights + companions)


def _tokens(tokenizer: Mapping[str, Any]) -> int:
    return min(int(tokenizer.get("model_max_length", LONGEST)), LONGEST)


def _refuse_distilled(spec: ModelSpec) -> None:
    if not spec.train_distilled:
        raise UserError(
            f"{spec.title} is distilled to a few steps: its velocity is no longer the flow's, so training on it gives "
            "grey, blurred pictures",
            "train on the base model of its size (model=flux2_klein_base_4b or flux2_klein_base_9b) and sample with "
            "this one, or set model.train_distilled=true",
        )


def parts_of(family: ModelFamily) -> dict[str, tuple[str, ...]]:
    """Folders beside the transformer -> the classes each may hold; none for a tokenizer."""
    return {"vae": (family.vae_class,), **family.text.parts}


def family_names() -> list[str]:
    """The families there are: the modules of this package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load_family(name: str) -> ModelFamily:
    """The family of that name; UserError for an unknown one."""
    if name not in family_names():
        raise UserError(f"model.family={name} is not a family", did_you_mean(name, family_names()))
    family: ModelFamily = importlib.import_module(f"{__name__}.{name}").FAMILY
    return family
