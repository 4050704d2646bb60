"""The data of a run as cached tensors, the texts that it needs encoded, and what its steps ask of a device's memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flux2_lora.dataset import Scan, preview_prompts
from flux2_lora.families import Model
from flux2_lora.inference.previews import PreviewSet
from flux2_lora.run.start import Start
from flux2_lora.run_options import RunOptions
from flux2_lora.training.encoding import CachedSamples, Encoder, texts_of
from flux2_lora.training.shortage import Knob, demand_of, knobs
from flux2_lora.training.step import Draws, Sample


@dataclass(frozen=True, kw_only=True)
class Data:
    """All that a run takes from outside, encoded. samples: to train on; held_out: to validate on; scene: of previews.

    draws: the noise and the noise levels of each step; facts: what a checkpoint notes down, and a resumed run must find
    again.
    """

    start: Start
    encoder: Encoder
    samples: CachedSamples
    held_out: Sequence[Sample]
    scene: PreviewSet
    draws: Draws
    facts: Mapping[str, Any]

    @property
    def model(self) -> Model:
        """The base, whose weights are still in their files."""
        return self.start.model


def base_prompts(config: RunOptions) -> list[str]:
    """Prompts in the base's own styles, on which forgetting is measured."""
    return config.model.base_prompts[: config.validation.base_style] if config.validation.every else []


def all_texts(config: RunOptions, found: Scan) -> list[str]:
    """Every text of the run, to be encoded together: a large encoder's layers are then read once."""
    captions = texts_of([*found.training, *found.validation], config.loss.preserved_class)
    previews = [*config.preview.prompts, *preview_prompts(config.dataset), config.preview.negative_prompt]
    return [*captions, *previews, *base_prompts(config)]


def remedies(config: RunOptions, data: Data, device: torch.device) -> list[Knob]:
    """The options that would need less memory than these."""
    demand = demand_of(
        data.model,
        config.precision,
        config.memory,
        config.adapter,
        device,
        choice=data.start.plan,
        batch_size=config.batch_size,
        side_px=config.dataset.side_px,
        text_tokens=data.scene.conditioning.embeds.shape[1],
    )
    return knobs(demand, resolution=config.dataset.side_px, rank=config.adapter.rank)
