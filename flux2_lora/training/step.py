"""One training step: cached latents and text in, a scalar loss out.

Law: noise and noise level of a sample are functions of (seed, step, place in the batch), never of carried state, so a
resumed run meets the same numbers as one that was never stopped, and two processes the numbers of one.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from flux2_lora.adapters import switched_off
from flux2_lora.ahead import running_ahead
from flux2_lora.conditioning import Conditioning, stack
from flux2_lora.families import ModelFamily
from flux2_lora.flow import LossSpec, TimestepSpec, draw_sigma, generator, loss_weights, mix, velocity_error

Place = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One picture as training sees it. latents: [c h w]; conditioning of batch 1; key: what it is a function of.

    mask: [1 h w], what each place counts, all ones where all of it does; weight: what the picture's loss counts.
    preserved: the caption without the trigger word, where the base's output on it is to be preserved.
    """

    latents: Tensor
    conditioning: Conditioning
    mask: Tensor
    key: str
    weight: float = 1.0
    preserved: Conditioning | None = None


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one process computes of a batch: items of the data, their places in the batch, and their part of its size.

    A process that gets none computes the first one and counts it 0 times, since all processes step together.
    """

    items: Sequence[Place]
    places: Sequence[int]
    counts: float
    size: float


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Pictures of one bucket. latents, noise: [b c h w]; conditioning of b; mask: [b 1 h w]; weights, sigmas: [b].

    The loss is the sum over the pictures divided by `size`, which is b but where a batch is shared among processes.
    """

    latents: Tensor
    conditioning: Conditioning
    mask: Tensor
    weights: Tensor
    noise: Tensor
    sigmas: Tensor
    size: float
    preserved: Conditioning | None = None

    def to(self, device: torch.device | str) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """In host memory that a CUDA device copies from while the host goes on."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {}
        for name, value in ((f.name, getattr(self, f.name)) for f in fields(self)):
            if isinstance(value, Tensor):
                changed[name] = change(value)
            elif isinstance(value, Conditioning):
                pooled = None if value.pooled is None else change(value.pooled)
                changed[name] = Conditioning(embeds=change(value.embeds), pooled=pooled)
        return replace(self, **changed)


def share_of(batch: Sequence[Place], rank: int, processes: int) -> Share:
    """Every `processes`-th item, beginning with that of `rank`."""
    places = list(range(rank, len(batch), processes))
    return Share(
        items=[batch[place] for place in places] or [batch[0]],
        places=places or [0],
        counts=1.0 if places else 0.0,
        size=len(batch) / processes,
    )


@dataclass(frozen=True, kw_only=True)
class Draws:
    """What a step draws: noise and noise levels of a batch, by the seed, the step and the places in the batch."""

    family: ModelFamily
    density: TimestepSpec
    seed: int

    def of(self, samples: Sequence[Sample], share: Share, step: int) -> Batch:
        """Stack samples of equal size and draw what belongs to them at micro-step `step`."""
        latents = torch.stack([sample.latents for sample in samples])
        mu = self.family.training_mu(latents.shape[2] * latents.shape[3])
        noises, sigmas = [], []
        for place, one in zip(share.places, latents, strict=True):
            stream = generator(self.seed, "step", step, place)
            sigmas.append(draw_sigma(self.density, mu, stream))
            noises.append(torch.randn(one.shape, generator=stream))
        preserved = [sample.preserved for sample in samples if sample.preserved is not None]
        return Batch(
            latents=latents,
            conditioning=stack([sample.conditioning for sample in samples]),
            mask=torch.stack([sample.mask for sample in samples]),
            weights=share.counts * torch.tensor([sample.weight for sample in samples]),
            noise=torch.stack(noises).to(latents),
            sigmas=torch.tensor(sigmas),
            size=share.size,
            preserved=stack(preserved) if preserved else None,
        )


def batches(
    samples: Dataset[Sample], shares: Sequence[Share], draws: Draws, *, first_step: int, workers: int, pinned: bool
) -> Iterator[Batch]:
    """The batches of `shares`, in that order whatever the number of worker processes; made ahead of their use."""
    loaded: Iterator[list[Sample]] = ([samples[item] for item in share.items] for share in shares)
    if workers:  # its processes are forked here, before a thread runs
        order = [list(share.items) for share in shares]
        loader = DataLoader(
            samples, batch_sampler=order, num_workers=workers, collate_fn=list, worker_init_fn=_outlive_ctrl_c
        )
        loaded = iter(loader)
    drawn = (
        draws.of(part, share, first_step + place)
        for place, (share, part) in enumerate(zip(shares, loaded, strict=True))
    )
    return running_ahead(batch.pinned() for batch in drawn) if pinned else running_ahead(drawn)


def _outlive_ctrl_c(_worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; the run still needs its batches to end the step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def training_loss(family: ModelFamily, transformer: nn.Module, batch: Batch, spec: LossSpec | None = None) -> Tensor:
    """Squared velocity error at the batch's noise. Lipman et al. 2022 (arXiv:2210.02747), eq. 23.

    Within a picture its mask weighs the places and is normalised, so a small mask does not mean a small loss; between
    pictures the weights of their sources and of their noise levels count.
    """
    spec = spec or LossSpec()
    noisy = mix(batch.latents, batch.noise, batch.sigmas)
    preserving = batch.preserved if spec.preserve else None
    kept = None if preserving is None else _base_velocity(family, transformer, noisy, batch.sigmas, preserving)

    predicted = family.velocity(transformer, noisy, batch.sigmas, batch.conditioning)
    errors = velocity_error(predicted, batch.noise - batch.latents, batch.mask, delta=spec.delta)
    counts = batch.weights * loss_weights(spec.weighting, batch.sigmas)
    loss = (counts * errors).sum() / batch.size

    if preserving is not None and kept is not None:
        moved = family.velocity(transformer, noisy, batch.sigmas, preserving)
        loss = loss + spec.preserve * (counts * velocity_error(moved, kept, delta=spec.delta)).sum() / batch.size
    return loss


@torch.no_grad()
def _base_velocity(
    family: ModelFamily, transformer: nn.Module, noisy: Tensor, sigmas: Tensor, conditioning: Conditioning
) -> Tensor:
    """What the base says, before the adapted forward: its graph must not see the adapter switched."""
    with switched_off(transformer):
        return family.velocity(transformer, noisy, sigmas, conditioning)


def average_gradients(parameters: Sequence[nn.Parameter], reduce: Callable[[Tensor], Tensor]) -> None:
    """Replace gradients by their mean over processes, in one exchange. reduce: the mean of a tensor over processes."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    mean = reduce(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
