"""Batches, schedules, validation and checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from flux2_lora.adapters import AdapterSpec, attach, state_of
from flux2_lora.conditioning import Conditioning
from flux2_lora.families import ModelFamily
from flux2_lora.training.optimizers import OptimizerSpec, learning_rate
from flux2_lora.training.state import restore, save_checkpoint
from flux2_lora.training.step import Sample
from flux2_lora.training.validation import ValidationSpec, validate
from tests.runs import adapter_of, built, step

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
    state = built(transformer, OptimizerSpec())
    step(state, seed=0)
    state.step = 7
    moments = [state.optimizer.state[p]["exp_avg"].clone() for p in state.parameters.values()]
    adapter = adapter_of(state, family)
    checkpoint = save_checkpoint(tmp_path, state, adapter, {})
    for parameter in state.parameters.values():
        nn.init.zeros_(parameter)
    fresh = built(transformer, OptimizerSpec())
    restore(checkpoint, fresh)
    assert fresh.step == 7
    assert all(torch.equal(adapter.state[key], value) for key, value in state_of(transformer).items())
    restored = [fresh.optimizer.state[p]["exp_avg"] for p in fresh.parameters.values()]
    assert all(torch.equal(one, other) for one, other in zip(moments, restored, strict=True))
