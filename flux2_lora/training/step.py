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
    """One picture as training sees it. latents: [c h w]; conditioning of batch 1; key: what it is a function of.

    mask: [1 h w], what each place counts, all ones where all of it does; weight: what the picture's loss counts.
    """

    latents: Tensor
    conditioning: Conditioning
    mask: Tensor
    key: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Pictures of one bucket. latents: [b c h w]; conditioning of b; mask: [b 1 h w]; weights: [b]."""

    latents: Tensor
    conditioning: Conditioning
    mask: Tensor
    weights: Tensor

    def to(self, device: torch.device | str) -> Batch:
        return Batch(
            latents=self.latents.to(device),
            conditioning=self.conditioning.to(device, self.conditioning.embeds.dtype),
            mask=self.mask.to(device),
            weights=self.weights.to(device),
        )


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of equal size."""
    return Batch(
        latents=torch.stack([sample.latents for sample in samples]),
        conditioning=stack([sample.conditioning for sample in samples]),
        mask=torch.stack([sample.mask for sample in samples]),
        weights=torch.tensor([sample.weight for sample in samples]),
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
    """Mean squared velocity error at one noise level a sample. Lipman et al. 2022 (arXiv:2210.02747), eq. 23.

    Within a picture its mask weighs the places and is normalised, so a small mask does not mean a small loss; between
    pictures the weights of their sources count.
    """
    mu = family.training_mu(batch.latents.shape[2] * batch.latents.shape[3])
    noises, sigmas = [], []
    for place, latents in enumerate(batch.latents):
        stream = generator(seed, "step", step, place)
        sigmas.append(draw_sigma(density, mu, stream))
        noises.append(torch.randn(latents.shape, generator=stream))
    noise = torch.stack(noises).to(batch.latents)
    levels = torch.tensor(sigmas, device=batch.latents.device)
    predicted = family.velocity(transformer, mix(batch.latents, noise, levels), levels, batch.conditioning)
    return (batch.weights * velocity_error(predicted, batch.latents, noise, batch.mask)).mean()
