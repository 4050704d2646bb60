"""A model opened for sampling: family, frozen transformer with its adapters, VAE, prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from flux2_lora.adapters import attach_trained, set_strengths
from flux2_lora.conditioning import Conditioning
from flux2_lora.devices import pick_device
from flux2_lora.families import ModelFamily, ModelSpec, load_family
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


def encode_prompts(spec: ModelSpec, prompts: Sequence[str], device_name: str) -> list[Conditioning]:
    """One conditioning a prompt; the text encoders are dropped again before the transformer is loaded."""
    device, family, folder = pick_device(device_name), load_family(spec.family), Path(spec.path).expanduser()
    family.check(folder)
    encode = family.load_prompt_encoder(folder, device)
    return [encode([prompt]).to(device, torch.float32) for prompt in prompts]


def open_session(spec: ModelSpec, precision: PrecisionSpec, adapters: Sequence[str], device_name: str) -> Session:
    """Load transformer and VAE, and attach the adapters; UserError for an adapter that does not fit."""
    device, family, folder = pick_device(device_name), load_family(spec.family), Path(spec.path).expanduser()
    family.check(folder)
    transformer = load_frozen(family, folder, precision, device)
    names = attach_trained(transformer, family, adapters)
    return Session(family, transformer, family.load_vae(folder, device), names, device)
