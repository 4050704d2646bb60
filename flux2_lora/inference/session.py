"""A model opened for sampling: family, frozen transformer with its adapters, VAE, prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from flux2_lora.adapters import Lora, attach_loras, set_strengths
from flux2_lora.conditioning import Conditioning
from flux2_lora.families import Model, ModelFamily
from flux2_lora.quantize import PrecisionSpec, load_frozen


@dataclass(frozen=True)
class Session:
    """What the programs sample with. adapters: the names that `use` takes, in the order of their files."""

    family: ModelFamily
    transformer: nn.Module
    vae: nn.Module
    adapters: list[str]
    device: torch.device

    def use(self, strengths: Sequence[float]) -> None:
        """Set one strength an adapter; all 0 is the base bit for bit."""
        set_strengths(self.transformer, dict(zip(self.adapters, strengths, strict=True)))


def encode_prompts(model: Model, prompts: Sequence[str], device: torch.device) -> list[Conditioning]:
    """One conditioning a prompt; the text encoders are dropped again before the transformer is loaded."""
    distinct = list(dict.fromkeys(prompts))
    encoded = dict(zip(distinct, model.load_prompt_encoder(device)(distinct), strict=True))
    return [encoded[prompt].to(device, torch.float32) for prompt in prompts]


def open_session(model: Model, precision: PrecisionSpec, loras: Mapping[str, Lora], device: torch.device) -> Session:
    """Load transformer and VAE, and attach the LoRAs."""
    transformer = load_frozen(model, precision, device)
    names = attach_loras(transformer, loras)
    return Session(model.family, transformer, model.load_vae(device), names, device)
