"""One training step: cached latents and text in, a scalar loss out.

Law: noise and noise level of a sample are functions of (seed, step, place in the batch), never of carried state, so a
resumed run meets the same numbers as one that was never stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from flux2_lora.conditioning import Conditioning, stack
from flux2_lora.families import ModelFamily
from flux2_lora.flow import TimestepSpec, draw_sigma, generator, mix, velocity_error


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One picture as training sees it. latents: [c h w]; conditioning of batch 1; key: what it is a function of."""

    latents: Tensor
    conditioning: Conditioning
    key: str


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Pictures of one bucket. latents: [b c h w]; conditioning of b."""

    latents: Tensor
    conditioning: Conditioning
    keys: tuple[str, ...]

    def to(self, device: torch.device | str) -> Batch:
        conditioning = self.conditioning.to(device, self.conditioning.embeds.dtype)
        return Batch(latents=self.latents.to(device), conditioning=conditioning, keys=self.keys)


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of equal size."""
    return Batch(
        latents=torch.stack([sample.latents for sample in samples]),
        conditioning=stack([sample.conditioning for sample in samples]),
        keys=tuple(sample.key for sample in samples),
    )


def batches(samples: Dataset[Sample], order: Sequence[Sequence[Any]], workers: int) -> Iterator[Batch]:
    """The batches named by `order`, in that order, whatever the number of worker processes."""
    loader = DataLoader(samples, batch_sampler=[list(b) for b in order], num_workers=workers, collate_fn=collate)
    yield from loader


def training_loss(
    family: ModelFamily,
    transformer: nn.Module,
    batch: Batch,
    density: TimestepSpec,
    *,
    seed: int,
    step: int,
) -> Tensor:
    """Mean squared velocity error at one noise level a sample. Lipman et al. 2022 (arXiv:2210.02747), eq. 23."""
    mu = family.training_mu(batch.latents.shape[2] * batch.latents.shape[3])
    noises, sigmas = [], []
    for place, latents in enumerate(batch.latents):
        stream = generator(seed, "step", step, place)
        sigmas.append(draw_sigma(density, mu, stream))
        noises.append(torch.randn(latents.shape, generator=stream))
    noise = torch.stack(noises).to(batch.latents)
    levels = torch.tensor(sigmas, device=batch.latents.device)
    predicted = family.velocity(transformer, mix(batch.latents, noise, levels), levels, batch.conditioning)
    return velocity_error(predicted, batch.latents, noise).mean()
