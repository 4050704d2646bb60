"""What the base draws by itself: the pictures on which a run measures how much of the base it forgets.

They are samples of the base's own flow, without classifier-free guidance, so on them the base is as good as it can be;
an adapter that changes how they are drawn has changed more than its own style.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load
from torch import nn

from flux2_lora.adapters import switched_off
from flux2_lora.files import digest, write_tensors
from flux2_lora.inference.sampling import Prompted, generate, initial_noise
from flux2_lora.training.encoding import Encoder
from flux2_lora.training.step import Sample

STEPS, LONGEST_PX = 20, 512


def own_samples(
    encoder: Encoder, transformer: nn.Module, prompts: Sequence[str], side_px: int, file: Path
) -> list[Sample]:
    """One sample a prompt, drawn by the base under the adapter; kept in `file`, and read from it the next time."""
    if not prompts:
        return []
    family = encoder.model.family
    keys = encoder.encode_texts(prompts)
    conditioning = encoder.conditioning([keys[prompt] for prompt in prompts])
    side = min(side_px, LONGEST_PX) // family.pixels_per_token * family.pixels_per_token
    key = digest(family.name, encoder.model.spec.path, *prompts, str(side))
    drawn = _kept(file, key)
    if drawn is None:
        there = conditioning.to(encoder.device, torch.float32)
        noise = initial_noise(family, side, side, range(len(prompts))).to(encoder.device)
        prompted = Prompted(positive=there, negative=there[:1], cfg_scale=1.0, guidance=None)
        with switched_off(transformer):
            drawn = generate(family, transformer, prompted, noise, STEPS).cpu()
        write_tensors(file, {key: drawn})
    return [
        Sample(
            latents=latents,
            conditioning=conditioning[place : place + 1],
            mask=torch.ones_like(latents[:1]),
            key=f"own/{place}/{prompts[place]}",
        )
        for place, latents in enumerate(drawn)
    ]


def _kept(file: Path, key: str) -> torch.Tensor | None:
    return load(file.read_bytes()).get(key) if file.is_file() else None
