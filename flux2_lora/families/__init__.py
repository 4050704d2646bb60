"""All that differs between models, behind one Protocol. A new family is one file here and one YAML in configs/model.

Each module of this package ends with `FAMILY`, an object that satisfies `ModelFamily`; `load_family` finds it by name.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from flux2_lora.conditioning import Conditioning
from flux2_lora.errors import UserError, did_you_mean

PromptEncoder = Callable[[Sequence[str]], Conditioning]


@dataclass(frozen=True, kw_only=True)
class TrainingDefaults:
    """What a run on this model uses where the user says nothing."""

    max_steps: int = 1000
    batch_size: int = 1
    rank: int = 16
    lr: float = 1e-4


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model: its family, where its Diffusers folder lies, and how its authors sample it.

    title: as file managers show it; architecture_name: as ModelSpec headers spell it.
    """

    family: str
    path: str
    title: str
    architecture_name: str
    resolution: int = 1024
    steps: int = 50
    cfg_scale: float = 1.0
    guidance: float | None = None
    training: TrainingDefaults = field(default_factory=TrainingDefaults)


class ModelFamily(Protocol):
    """One model architecture with its text encoder and VAE.

    latents: [b c h w] with h, w in tokens; pixels: [b 3 H W] in [-1, 1] with H, W multiples of `pixels_per_token`.
    """

    @property
    def name(self) -> str: ...

    @property
    def architecture(self) -> str:
        """Row of flux2_lora.keys that names this transformer's weights."""

    @property
    def latent_channels(self) -> int: ...

    @property
    def pixels_per_token(self) -> int: ...

    def check(self, folder: Path) -> None:
        """UserError unless the folder holds a model of this family, weights included."""

    def target_modules(self, targets: Sequence[str]) -> str:
        """Regular expression over module names for groups out of {attention, mlp}."""

    def load_transformer(self, folder: Path, dtype: torch.dtype) -> nn.Module: ...

    def load_vae(self, folder: Path, device: torch.device) -> nn.Module: ...

    def load_prompt_encoder(self, folder: Path, device: torch.device) -> PromptEncoder: ...

    def encode_pixels(self, vae: nn.Module, pixels: Tensor) -> Tensor:
        """Pixels -> normalised latents, the mode of the posterior."""

    def decode_latents(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Normalised latents -> pixels, clamped to [-1, 1]."""

    def velocity(
        self,
        transformer: nn.Module,
        latents: Tensor,
        sigmas: Tensor,
        conditioning: Conditioning,
        guidance: float | None = None,
    ) -> Tensor:
        """d latents / d sigma at noise levels sigmas [b] in [0, 1]; same shape as latents."""

    def training_mu(self, tokens: int) -> float:
        """Shift exponent of the training density for a picture of `tokens` packed tokens."""

    def inference_mu(self, tokens: int, steps: int) -> float:
        """Shift exponent of the sampling schedule."""


def family_names() -> list[str]:
    """The families there are: the modules of this package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load_family(name: str) -> ModelFamily:
    """The family of that name; UserError for an unknown one."""
    if name not in family_names():
        raise UserError(f"model.family={name} is not a family", did_you_mean(name, family_names()))
    family: ModelFamily = importlib.import_module(f"{__name__}.{name}").FAMILY
    return family
