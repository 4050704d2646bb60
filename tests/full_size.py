"""The models that can be downloaded, at full size and without memory: their classes on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate import init_empty_weights
from torch import nn

FLUX1, FLUX2 = "FluxTransformer2DModel", "Flux2Transformer2DModel"
KLEIN_4B = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
KLEIN_9B = {
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
    "guidance_embeds": False,
}
SMALL = {"num_layers": 8, "num_single_layers": 37, "num_attention_heads": 32, "joint_attention_dim": 4096}
MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "klein 4B": (FLUX2, KLEIN_4B),
    "klein 9B": (FLUX2, KLEIN_9B),
    "small": (FLUX2, SMALL),
    "FLUX.2 dev": (FLUX2, {}),
    "FLUX.1 dev": (FLUX1, {"guidance_embeds": True}),
}


def full_size(name: str) -> nn.Module:
    """A model of `MODELS` on the meta device."""
    import diffusers

    kind, settings = MODELS[name]
    with init_empty_weights():
        model: nn.Module = getattr(diffusers, kind)(**settings)
    return model
