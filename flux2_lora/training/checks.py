"""Self-checks: a few forwards before hours are spent, each of which would have caught a fault that trainers really had.

Adapters that touched half of the projections, captions that never reached the model, a shift counted from the wrong
tokens: none of these stops a run, and none shows in its loss. Each check says what it found wrong, or nothing. None
changes a weight or draws a number that training draws.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from flux2_lora.adapters import AdapterSpec, lora_layers, switched_off, trainable
from flux2_lora.conditioning import Conditioning
from flux2_lora.errors import RunError, listed
from flux2_lora.families import Model
from flux2_lora.flow import LossSpec, linear_mu, mix, part_below, sigma_above
from flux2_lora.targets import resolve
from flux2_lora.training.encoding import CachedSamples
from flux2_lora.training.optimizers import all_parameters
from flux2_lora.training.step import Batch, Draws, Place, share_of, training_loss

_SAMPLES, _DRAWS = 8, 512
"""Pictures that are looked at, and noise levels that are drawn."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a run is about to train, and the batch it is tried on. before: the base's velocity before it was adapted."""

    model: Model
    transformer: nn.Module
    spec: AdapterSpec
    optimizer: torch.optim.Optimizer
    samples: CachedSamples
    draws: Draws
    loss: LossSpec
    batch: Batch
    before: Tensor

    def loss_of(self, batch: Batch) -> Tensor:
        """The training loss; float32 throughout, for a check compares small differences."""
        return training_loss(self.model.family, self.transformer, batch, self.loss)


Check = Callable[[Subject], str | None]


def probe(samples: CachedSamples, draws: Draws, batch: list[Place], device: torch.device) -> Batch:
    """The first pictures of a batch, with the noise that they would have at step 0."""
    share = share_of(batch[:4], rank=0, processes=1)
    return draws.of([samples[item] for item in share.items], share, 0).to(device)


@torch.no_grad()
def velocity(model: Model, transformer: nn.Module, batch: Batch, conditioning: Conditioning | None = None) -> Tensor:
    """What the transformer says of the batch, under its own conditioning or another."""
    noisy = mix(batch.latents, batch.noise, batch.sigmas)
    return model.family.velocity(transformer, noisy, batch.sigmas, conditioning or batch.conditioning)


def run_checks(subject: Subject) -> str:
    """How many checks were passed in how many seconds, in words; RunError that names the ones that were not."""
    began = time.monotonic()
    failed = [f"{name}: {reason}" for name, check in CHECKS.items() if (reason := check(subject))]
    if failed:
        raise RunError(
            f"{len(failed)} of {len(CHECKS)} checks before training failed; " + "; ".join(failed),
            "nothing was trained; please report this with run.yaml, or set checks=false to train all the same",
        )
    return f"{len(CHECKS)} of {len(CHECKS)} checks passed, {time.monotonic() - began:.1f} s"


def base_is_kept(subject: Subject) -> str | None:
    """At strength 0 the adapted model is the base, bit for bit."""
    with switched_off(subject.transformer):
        after = velocity(subject.model, subject.transformer, subject.batch)
    if torch.equal(after, subject.before):
        return None
    return f"at strength 0 the velocity differs from the base's by up to {(after - subject.before).abs().max():.2g}"


def targets_are_there(subject: Subject) -> str | None:
    """Every projection that adapter.targets names has an adapter that the optimizer will move."""
    modules = subject.model.projections()
    wanted = resolve(subject.spec.targets, subject.model.family.architecture, modules, subject.spec.rank)
    moved = {id(parameter) for parameter in all_parameters(subject.optimizer)}
    there = {
        path
        for path, layer in lora_layers(subject.transformer)
        if all(id(part["default"].weight) in moved for part in (layer.lora_A, layer.lora_B))
    }
    lacking = [path for path in wanted if path not in there]
    if lacking:
        return f"{len(lacking)} of {len(wanted)} projections have no adapter that is trained: {listed(lacking, 3)}"
    return None


def a_step_lowers_the_loss(subject: Subject) -> str | None:
    """A small step against the gradient lowers the loss on the very batch, and every projection has a gradient."""
    parameters = trainable(subject.transformer)
    if not parameters:
        return "no number of the model is trained"
    loss = subject.loss_of(subject.batch)
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    moving = {
        name.partition(".lora_")[0]
        for name, gradient in zip(parameters, gradients, strict=True)
        if gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.any())
    }
    dead = [path for path, _ in lora_layers(subject.transformer) if path not in moving]
    if dead:
        return f"{len(dead)} projections get no gradient: {listed(dead, 3)}"
    before = loss.item()
    lowered = _after_a_step(subject, parameters, gradients, before)
    return None if lowered < before else f"a step against the gradient led from {before:.5f} to {lowered:.5f}"


@torch.no_grad()
def _after_a_step(
    subject: Subject, parameters: Mapping[str, nn.Parameter], gradients: Sequence[Tensor], loss: float
) -> float:
    """The lowest loss after steps that should lower it by 3 % and less; the parameters are put back."""
    before = [parameter.detach().clone() for parameter in parameters.values()]
    square = float(sum(gradient.double().square().sum() for gradient in gradients))
    lowest = math.inf
    for part in (0.03, 0.003, 0.0003):
        for parameter, value, gradient in zip(parameters.values(), before, gradients, strict=True):
            parameter.copy_(value - part * loss / square * gradient)
        lowest = min(lowest, float(subject.loss_of(subject.batch)))
    for parameter, value in zip(parameters.values(), before, strict=True):
        parameter.copy_(value)
    return lowest


def captions_reach_the_model(subject: Subject) -> str | None:
    """Samples carry the text of one of their captions, and another text gives another velocity."""
    samples, encoder = subject.samples, subject.samples.encoder
    texts = list(dict.fromkeys(text for item in samples.items for text in item.record.texts))[:_SAMPLES]
    encoded = {text: encoder.conditioning([samples.text_keys[text]]) for text in texts}
    for place, item in enumerate(samples.items[:_SAMPLES]):
        carried = samples[place, 0].conditioning.embeds
        own = (encoder.conditioning([samples.text_keys[text]]).embeds for text in item.record.texts)
        if item.record.source.caption_dropout == 0 and not any(torch.equal(carried, one) for one in own):
            return f"{item.record.name} is trained with another text than its caption"
    if len(texts) < 2:
        return None
    first = encoded[texts[0]]
    other = next((text for text in texts if not torch.equal(encoded[text].embeds, first.embeds)), None)
    if other is None:  # some may be: those that differ in words that the encoder does not know, or beyond its length
        return f"{len(texts)} different captions are all encoded alike, as {texts[0]!r} is"
    device, count = subject.batch.latents.device, len(subject.batch.latents)
    under = [
        velocity(subject.model, subject.transformer, subject.batch, text.repeat(count).to(device, text.embeds.dtype))
        for text in (first, encoded[other])
    ]
    return f"{texts[0]!r} and {other!r} give the same velocity" if torch.equal(*under) else None


def masks_change_the_loss(subject: Subject) -> str | None:
    """A picture with a mask has another loss than without."""
    masked = [place for place, item in enumerate(subject.samples.items) if item.record.mask]
    if not masked or subject.samples.spec.unmasked_weight == 1:
        return None
    batch = probe(subject.samples, subject.draws, [(masked[0], 0)], subject.batch.latents.device)
    with torch.no_grad():
        with_mask = subject.loss_of(batch)
        without = subject.loss_of(replace(batch, mask=torch.ones_like(batch.mask)))
    name = subject.samples.items[masked[0]].record.name
    return f"the mask of {name} leaves the loss as it is" if torch.equal(with_mask, without) else None


def flips_change_the_picture(subject: Subject) -> str | None:
    """A mirrored crop has other latents than the straight one, in some picture at least."""
    samples = subject.samples
    flipped = [item for item in samples.items if item.record.source.flip][:_SAMPLES]
    for item in flipped:
        crops = item.record.crops(item.bucket, samples.seed)
        keys = samples.crop_keys[item.record, item.bucket]
        sides = {crop.mirrored: key for crop, key in zip(crops, keys, strict=True)}
        if len(sides) == 2:
            straight, mirrored = (samples.encoder.posterior(sides[side])[0].mean for side in (False, True))
            if not torch.equal(straight, mirrored):
                return None
    return f"dataset.flip mirrors none of {len(flipped)} pictures, or all of them are symmetric" if flipped else None


def noise_levels_are_the_models(subject: Subject) -> str | None:
    """The noise levels of steps to come have the median that the model's shift and the picture's size ask for."""
    item = subject.samples.items[0]
    height, width = item.bucket
    spec, tokens = subject.draws.density, (height // 16) * (width // 16)
    mu = _reference_mu(subject.model, tokens)
    low, high = (part_below(spec, mu, sigma) for sigma in (spec.min_sigma, spec.max_sigma))
    expected = sigma_above(spec, mu, (low + high) / 2)
    share = share_of([(0, 0)], rank=0, processes=1)
    sample = subject.samples.still(0)
    sample = replace(sample, latents=sample.latents[:1])  # the noise itself does not matter
    drawn = torch.cat([subject.draws.of([sample], share, -1 - step).sigmas for step in range(_DRAWS)])
    below = float((drawn < expected).double().mean())
    if abs(below - 0.5) < 4 * 0.5 / math.sqrt(_DRAWS):  # four standard errors of the part below a median
        return None
    return (
        f"the median noise level is {float(drawn.median()):.3f} at {width} x {height} px, the model's is {expected:.3f}"
    )


def _reference_mu(model: Model, tokens: int) -> float:
    """The shift exponent by the scheduler's own file where the model has one, since our formula is what is checked."""
    file = model.files.components / "scheduler" / "scheduler_config.json"
    told = json.loads(file.read_text()) if file.is_file() else {}
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    if not all(name in told for name in names):
        return linear_mu(tokens)
    few, many, low, high = (told[name] for name in names)
    return float(low + (tokens - few) * (high - low) / (many - few))


CHECKS: Mapping[str, Check] = {
    "strength 0 is the base": base_is_kept,
    "all targets are trained": targets_are_there,
    "a step lowers the loss": a_step_lowers_the_loss,
    "captions reach the model": captions_reach_the_model,
    "masks change the loss": masks_change_the_loss,
    "flips change the picture": flips_change_the_picture,
    "noise levels are the model's": noise_levels_are_the_models,
}
