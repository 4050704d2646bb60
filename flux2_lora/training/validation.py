"""A number that means something between steps: the loss on held-out pictures at fixed noise levels.

The training loss of a flow model is dominated by which noise levels were drawn. Here levels are fixed and the noise is
a function of the picture, so two evaluations differ by the weights alone, between steps, runs and settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from flux2_lora.conditioning import stack
from flux2_lora.families import ModelFamily
from flux2_lora.flow import generator, mix, velocity_error
from flux2_lora.options import option
from flux2_lora.training.step import Sample


@dataclass(frozen=True, kw_only=True)
class ValidationSpec:
    """every: steps between evaluations (0: never); sigmas: noise levels in (0, 1); most: pictures at most.

    base_style: how many of the model's base prompts are drawn by the base itself, to measure what is forgotten of it;
    nearest: whether previews are compared with the training pictures; features: a folder of CLIP or DINOv2 to compare
    by, null for the VAE's latents. patience: end after so many evaluations without a new best (0: never).
    """

    every: int = option(50, at_least=0)
    sigmas: list[float] = field(
        default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9], metadata={"above": 0, "at_most": 0.999}
    )
    most: int = option(64, at_least=1)
    base_style: int = option(4, at_least=0)
    nearest: bool = True
    features: str | None = None
    patience: int = option(0, at_least=0)


@dataclass(frozen=True, kw_only=True)
class ValidationLoss:
    """Mean squared velocity error a noise level, and their mean."""

    by_sigma: dict[float, float]

    @property
    def mean(self) -> float:
        return sum(self.by_sigma.values()) / len(self.by_sigma)

    def row(self) -> dict[str, float]:
        """As it is written to metrics.jsonl."""
        parts = {f"validation_loss_sigma_{sigma:g}": loss for sigma, loss in self.by_sigma.items()}
        return {"validation_loss": self.mean, **parts}


@torch.no_grad()
def validate(
    family: ModelFamily,
    transformer: nn.Module,
    samples: Sequence[Sample],
    sigmas: Sequence[float],
    device: torch.device,
    batch_size: int = 16,
) -> ValidationLoss:
    """Evaluate on `samples` (any mixture of sizes); each picture and noise level counts the same."""
    groups: dict[tuple[int, ...], list[Sample]] = {}
    for sample in samples:
        groups.setdefault(tuple(sample.latents.shape), []).append(sample)
    parts = [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]
    losses = dict.fromkeys(sigmas, 0.0)
    for part in parts:
        latents = torch.stack([sample.latents for sample in part]).to(device)
        mask = torch.stack([sample.mask for sample in part]).to(device)
        noise = torch.stack([_noise_of(sample) for sample in part]).to(device)
        conditioning = stack([sample.conditioning for sample in part])
        conditioning = conditioning.to(device, conditioning.embeds.dtype)
        for sigma in sigmas:
            levels = torch.full((len(part),), sigma, device=device)
            predicted = family.velocity(transformer, mix(latents, noise, levels), levels, conditioning)
            losses[sigma] += velocity_error(predicted, noise - latents, mask).sum().item() / len(samples)
    return ValidationLoss(by_sigma=losses)


def _noise_of(sample: Sample) -> torch.Tensor:
    return torch.randn(sample.latents.shape, generator=generator("validation", sample.key))
