"""Batches, schedules, validation and checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from flux2_lora.adapters import Adapter, AdapterSpec, attach, state_of, trainable
from flux2_lora.conditioning import Conditioning
from flux2_lora.errors import UserError
from flux2_lora.families import ModelFamily
from flux2_lora.training.optimizers import OptimizerSpec, learning_rate, make_optimizer
from flux2_lora.training.state import latest_checkpoint, open_checkpoint, restore, save_checkpoint
from flux2_lora.training.step import Sample
from flux2_lora.training.validation import ValidationSpec, validate

SIGMAS = ValidationSpec().sigmas


def sample(key: str, width: int = 2) -> Sample:
    noise = torch.Generator().manual_seed(len(key))
    embeds = torch.randn(1, 5, 24, generator=noise)
    return Sample(
        latents=torch.randn(128, 2, width, generator=noise),
        conditioning=Conditioning(embeds=embeds),
        mask=torch.ones(1, 2, width),
        key=key,
    )


def test_the_rate_warms_up_holds_and_falls() -> None:
    constant, cosine = OptimizerSpec(lr=1.0, warmup_steps=4), OptimizerSpec(lr=1.0, warmup_steps=0, schedule="cosine")
    assert [learning_rate(constant, step, 10) for step in (0, 3, 4, 9)] == pytest.approx([0.2, 0.8, 1.0, 1.0])
    assert learning_rate(cosine, 0, 10) == pytest.approx(1.0)
    assert learning_rate(cosine, 5, 10) == pytest.approx(0.5)


def test_validation_is_the_same_each_time_and_for_any_batch_size(family: ModelFamily, transformer: nn.Module) -> None:
    samples = [sample("a"), sample("bb"), sample("ccc", width=3)]
    cpu = torch.device("cpu")
    torch.manual_seed(1)
    first = validate(family, transformer, samples, SIGMAS, cpu, batch_size=1)
    torch.manual_seed(2)
    again = validate(family, transformer, samples, SIGMAS, cpu, batch_size=16)
    assert first.row() == pytest.approx(again.row(), rel=1e-5)
    assert set(first.by_sigma) == set(SIGMAS)


def test_a_checkpoint_restores_adapter_and_moments(family: ModelFamily, transformer: nn.Module, tmp_path: Path) -> None:
    attach(transformer, "flux2", AdapterSpec(rank=2), seed=0)
    optimizer = make_optimizer(OptimizerSpec(), trainable(transformer))
    for parameter in trainable(transformer):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = [optimizer.state[p]["exp_avg"].clone() for p in trainable(transformer)]
    state = state_of(transformer)
    adapter = Adapter(state=state, rank=2, alpha=2, targets=["attention", "mlp"], family=family.name)
    checkpoint = save_checkpoint(tmp_path, 7, adapter, optimizer)
    for parameter in trainable(transformer):
        nn.init.zeros_(parameter)
    fresh = make_optimizer(OptimizerSpec(), trainable(transformer))
    restore(checkpoint, transformer, fresh)
    assert all(torch.equal(state[key], value) for key, value in state_of(transformer).items())
    restored = [fresh.state[p]["exp_avg"] for p in trainable(transformer)]
    assert all(torch.equal(one, other) for one, other in zip(moments, restored, strict=True))


def test_an_unfinished_checkpoint_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "checkpoints/step-000009").mkdir(parents=True)
    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(UserError, match="is not a whole checkpoint"):
        open_checkpoint(tmp_path / "checkpoints/step-000009")
