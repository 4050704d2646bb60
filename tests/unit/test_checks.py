"""Each self-check catches the fault that it is there for, and none is raised on a sound run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from flux2_lora import flow
from flux2_lora.adapters import AdapterSpec, attach, lora_layers, state_of, trainable
from flux2_lora.dataset import DatasetSpec
from flux2_lora.errors import RunError
from flux2_lora.families import Model
from flux2_lora.families.flux2_small import FAMILY
from flux2_lora.flow import LossSpec, TimestepSpec
from flux2_lora.quantize import PrecisionSpec, load_frozen
from flux2_lora.training import checks
from flux2_lora.training.checks import CHECKS, Subject, probe, run_checks, velocity
from flux2_lora.training.encoding import CachedSamples, Encoder, encode_samples
from flux2_lora.training.optimizers import OptimizerSpec, grouped, make_optimizer
from flux2_lora.training.step import Draws
from tests.sets import picture, scanned, spec

CPU = torch.device("cpu")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three pictures whose halves have different colours."""
    for name, colour in (("cat", "red"), ("dog", "blue"), ("tree", "green")):
        two_halves(picture(tmp_path / "set" / f"{name}.png", f"a {name}"), colour)
    return tmp_path / "set"


def two_halves(path: Path, left: str, right: str = "white") -> None:
    canvas = Image.new("RGB", (64, 64), right)
    canvas.paste(left, (0, 0, 32, 64))
    canvas.save(path)


def subject(folder: Path, model: Model, targets: list[str] | None = None, *, flip: bool = False) -> Subject:
    """A run on the bundled model, up to its checks; targets: what is attached, where it is not what is asked for."""
    options: DatasetSpec = spec(folder, flip=flip)
    encoder = Encoder(model, folder.parent / "cache", CPU)
    samples = encode_samples(encoder, scanned(options).training, options, seed=0)
    draws = Draws(family=model.family, density=TimestepSpec(), seed=0)
    batch = probe(samples, draws, [(place, 0) for place in range(len(samples))], CPU)
    transformer = load_frozen(model, PrecisionSpec(base="fp32"), CPU)
    before = velocity(model, transformer, batch)
    attach(transformer, "flux2", AdapterSpec(rank=4, targets=targets or ["attention", "mlp"]), seed=0)
    optimizer_spec = OptimizerSpec()
    return Subject(
        model=model,
        transformer=transformer,
        spec=AdapterSpec(rank=4),
        optimizer=make_optimizer(optimizer_spec, grouped(optimizer_spec, "flux2", trainable(transformer))),
        samples=samples,
        draws=draws,
        loss=LossSpec(),
        batch=batch,
        before=before,
    )


def caught(found: Subject) -> list[str]:
    """The names of the checks that fail."""
    return [name for name, check in CHECKS.items() if check(found)]


def test_a_sound_run_passes_and_is_not_changed(pictures: Path, tiny_model: Model) -> None:
    found = subject(pictures, tiny_model, flip=True)
    before = state_of(found.transformer)
    assert run_checks(found).startswith("7 of 7 checks passed")
    assert all(torch.equal(before[name], tensor) for name, tensor in state_of(found.transformer).items())
    assert all(parameter.requires_grad for parameter in trainable(found.transformer).values())


def test_half_of_the_targets_is_caught(pictures: Path, tiny_model: Model) -> None:
    found = subject(pictures, tiny_model, ["double"])
    assert "all targets are trained" in caught(found)
    with pytest.raises(RunError, match="8 of 32 projections have no adapter that is trained"):
        run_checks(found)


def test_an_adapter_that_is_not_in_the_optimizer_is_caught(pictures: Path, tiny_model: Model) -> None:
    found = subject(pictures, tiny_model)
    for group in found.optimizer.param_groups:
        group["params"] = group["params"][2:]
    assert caught(found) == ["all targets are trained"]


def test_a_frozen_adapter_is_caught(pictures: Path, tiny_model: Model) -> None:
    found = subject(pictures, tiny_model)
    for _, layer in list(lora_layers(found.transformer))[:3]:
        layer.lora_A["default"].requires_grad_(False)  # type: ignore[operator]
        layer.lora_B["default"].requires_grad_(False)  # type: ignore[operator]
    assert "a step lowers the loss" in caught(found)


def test_a_changed_base_is_caught(pictures: Path, tiny_model: Model) -> None:
    found = subject(pictures, tiny_model)
    with torch.no_grad():
        found.transformer.get_submodule("proj_out").weight.mul_(1.001)  # type: ignore[operator, union-attr]
    assert caught(found) == ["strength 0 is the base"]


def test_a_dropped_caption_is_caught(pictures: Path, tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    found = subject(pictures, tiny_model)
    given = CachedSamples._sample
    found.samples.encoder.encode_texts([""])
    texts = {**found.samples.text_keys, "": next(iter(found.samples.encoder.encode_texts([""]).values()))}
    found = replace(found, samples=replace(found.samples, text_keys=texts))
    monkeypatch.setattr(
        CachedSamples, "_sample", lambda self, item, latents, mask, _text: given(self, item, latents, mask, "")
    )
    assert caught(found) == ["captions reach the model"]


def test_one_text_for_all_captions_is_caught(pictures: Path, tiny_model: Model) -> None:
    found = subject(pictures, tiny_model)
    one = next(iter(found.samples.text_keys.values()))
    blind = replace(found.samples, text_keys=dict.fromkeys(found.samples.text_keys, one))
    assert caught(replace(found, samples=blind)) == ["captions reach the model"]


def test_a_model_that_does_not_read_its_text_is_caught(
    pictures: Path, tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, real = subject(pictures, tiny_model), type(FAMILY).velocity

    def deaf(
        family: object, transformer: nn.Module, latents: torch.Tensor, sigmas: torch.Tensor, text: object
    ) -> object:
        return real(family, transformer, latents, sigmas, replace(text, embeds=torch.zeros_like(text.embeds)))  # type: ignore[type-var, attr-defined, arg-type]

    monkeypatch.setattr(type(FAMILY), "velocity", deaf)
    assert "captions reach the model" in caught(found)


def test_a_mask_that_does_not_reach_the_loss_is_caught(
    pictures: Path, tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_halves(pictures / "cat-masklabel.png", "black")
    found = subject(pictures, tiny_model)
    assert caught(found) == []
    monkeypatch.setattr(
        "flux2_lora.training.step.velocity_error",
        lambda predicted, target, _mask=None, delta=None: flow.velocity_error(predicted, target, delta=delta),
    )
    assert caught(found) == ["masks change the loss"]


def test_a_flip_that_mirrors_nothing_is_caught(pictures: Path, tiny_model: Model) -> None:
    found = subject(pictures, tiny_model, flip=True)
    straight = {place: [keys[0]] * len(keys) for place, keys in found.samples.crop_keys.items()}
    assert caught(replace(found, samples=replace(found.samples, crop_keys=straight))) == ["flips change the picture"]


WRONG_SHIFTS: list[Callable[[int], float]] = [
    lambda tokens: flow.linear_mu(tokens) + 0.7,  # as a shift of twice as much would be
    lambda _tokens: 0.0,
    lambda tokens: -flow.linear_mu(tokens),
]


@pytest.mark.parametrize("wrong", WRONG_SHIFTS)
def test_a_wrong_shift_is_caught(
    pictures: Path, tiny_model: Model, monkeypatch: pytest.MonkeyPatch, wrong: Callable[[int], float]
) -> None:
    found = subject(pictures, tiny_model)
    monkeypatch.setattr(type(FAMILY), "training_mu", lambda _family, tokens: wrong(tokens))
    assert caught(found) == ["noise levels are the model's"]


def test_tokens_counted_four_times_too_few_at_full_size_are_caught(
    pictures: Path, tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 1024 px, where a real trainer had this fault for months; the pictures here stand for larger ones."""
    found = subject(pictures, tiny_model)
    item = found.samples.items[0]
    large = replace(found.samples, items=[replace(item, bucket=(1024, 1024))])
    still = found.samples.still(0)
    monkeypatch.setattr(
        CachedSamples, "still", lambda _samples, _index: replace(still, latents=torch.zeros(128, 64, 64))
    )
    assert checks.noise_levels_are_the_models(replace(found, samples=large)) is None
    monkeypatch.setattr(type(FAMILY), "training_mu", lambda _family, tokens: flow.linear_mu(tokens // 4))
    assert checks.noise_levels_are_the_models(replace(found, samples=large)) is not None
