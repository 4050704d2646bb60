"""Every optimizer goes on exactly where it stopped; rates by schedule, by block and by matrix."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from flux2_lora.adapters import AdapterSpec, attach, state_of, trainable
from flux2_lora.errors import UserError
from flux2_lora.families import ModelFamily
from flux2_lora.training.averaging import Ema, shown
from flux2_lora.training.optimizers import (
    OptimizerSpec,
    grouped,
    learning_rate,
    make_optimizer,
    refuse_mixtures,
    set_rate,
)
from flux2_lora.training.state import restore, save_checkpoint
from tests.runs import adapter_of, built, step

KINDS = ["adamw", "adamw8bit", "prodigy", "schedule_free", "adafactor", "lion", "came"]
CPU = torch.device("cpu")


@pytest.fixture
def adapted(transformer: nn.Module) -> nn.Module:
    attach(transformer, "flux2", AdapterSpec(rank=2), seed=0)
    return transformer


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_checkpoint_the_weights_go_on_bit_for_bit(
    adapted: nn.Module, family: ModelFamily, tmp_path: Path, kind: str
) -> None:
    spec = OptimizerSpec(kind=kind, lr=1.0 if kind == "prodigy" else 1e-3)
    state = built(adapted, spec)
    for seed in range(3):
        step(state, seed)
    checkpoint = save_checkpoint(tmp_path, state, adapter_of(state, family), {})
    for seed in range(3, 6):
        step(state, seed)
    whole = state_of(adapted)
    nn.init.zeros_(next(iter(state.parameters.values())))
    resumed = built(adapted, spec)
    restore(checkpoint, resumed)
    for seed in range(3, 6):
        step(resumed, seed)
    assert all(torch.equal(whole[name], tensor) for name, tensor in state_of(adapted).items())


@pytest.mark.parametrize("kind", KINDS)
def test_each_optimizer_moves_every_parameter(adapted: nn.Module, kind: str) -> None:
    state = built(adapted, OptimizerSpec(kind=kind, lr=1.0 if kind == "prodigy" else 1e-3))
    before = state_of(adapted)
    for seed in range(4):
        step(state, seed)
    assert all(not torch.equal(before[name], tensor) for name, tensor in state_of(adapted).items())


@pytest.mark.parametrize("spec", [OptimizerSpec(ema_decay=0.9), OptimizerSpec(kind="schedule_free", lr=1e-3)])
def test_looking_through_the_shown_weights_changes_no_trained_one(adapted: nn.Module, spec: OptimizerSpec) -> None:
    state = built(adapted, spec)
    for seed in range(3):
        step(state, seed)
    trained = state_of(adapted)
    with shown(state.optimizer, state.ema, list(state.parameters.values())):
        seen = state_of(adapted)
    assert any(not torch.equal(trained[name], seen[name]) for name in trained)
    assert all(torch.equal(trained[name], tensor) for name, tensor in state_of(adapted).items())
    step(state, 3)
    assert any(not torch.equal(trained[name], tensor) for name, tensor in state_of(adapted).items())


def test_an_ema_is_the_mean_that_its_decay_says() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    ema, expected = Ema(0.5, [parameter]), 0.0
    for number in range(1, 30):
        parameter.data.fill_(number)
        ema.update()
        decay = min(0.5, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * number
    assert ema.average[0].item() == pytest.approx(expected, rel=1e-5)


def test_lora_plus_gives_b_its_multiple_of_the_rate(adapted: nn.Module) -> None:
    spec = OptimizerSpec(lr=1e-3, b_lr_ratio=16)
    parameters = trainable(adapted)
    optimizer = make_optimizer(spec, grouped(spec, "flux2", parameters))
    set_rate(optimizer, 1e-3)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rates[id(p)] for name, p in parameters.items() if ".lora_A." in name} == {1e-3}
    assert {rates[id(p)] for name, p in parameters.items() if ".lora_B." in name} == {1.6e-2}


def test_blocks_have_their_factors_of_the_rate_and_the_later_entry_holds(adapted: nn.Module) -> None:
    spec = OptimizerSpec(lr=1.0, block_lr=["single:0.5", "single[1:2]:0.25"])
    groups = grouped(spec, "flux2", trainable(adapted))
    scales = {
        name: group["lr_scale"]
        for group in groups
        for name, parameter in trainable(adapted).items()
        if any(parameter is one for one in group["params"])
    }
    assert {scale for name, scale in scales.items() if name.startswith("single_transformer_blocks.0.")} == {0.5}
    assert {scale for name, scale in scales.items() if name.startswith("single_transformer_blocks.1.")} == {0.25}
    assert {scale for name, scale in scales.items() if name.startswith("transformer_blocks.")} == {1.0}


def test_a_block_that_is_not_there_has_no_rate(adapted: nn.Module) -> None:
    with pytest.raises(UserError, match=r"optimizer\.block_lr names 'single\[7:9\]:2'"):
        grouped(OptimizerSpec(block_lr=["single[7:9]:2"]), "flux2", trainable(adapted))


@pytest.mark.parametrize(
    ("schedule", "half", "end"),
    [("constant", 1, 1), ("linear", 0.5, 0.1), ("cosine", 0.5, 0.0245), ("rex", 2 / 3, 0.1818)],
)
def test_schedules_fall_as_their_formulas_say(schedule: str, half: float, end: float) -> None:
    spec = OptimizerSpec(lr=1.0, warmup_steps=0, schedule=schedule)
    assert learning_rate(spec, 0, 10) == pytest.approx(1)
    assert learning_rate(spec, 5, 10) == pytest.approx(half)
    assert learning_rate(spec, 9, 10) == pytest.approx(end, abs=1e-3)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (OptimizerSpec(kind="prodigy", b_lr_ratio=16), "one rate for all"),
        (OptimizerSpec(kind="schedule_free", schedule="cosine"), "in place of a schedule"),
        (OptimizerSpec(kind="schedule_free", ema_decay=0.9), "in place of a schedule"),
        (OptimizerSpec(kind="paged_adamw8bit"), "pages between a CUDA device"),
    ],
)
def test_what_would_silently_do_nothing_is_refused(spec: OptimizerSpec, text: str) -> None:
    with pytest.raises(UserError, match=text):
        refuse_mixtures(spec, CPU)


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    adapted: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pytorch_optimizer", None)
    spec = OptimizerSpec(kind="lion")
    with pytest.raises(UserError, match="optimizer=lion needs pytorch_optimizer") as error:
        make_optimizer(spec, grouped(spec, "flux2", trainable(adapted)))
    assert "flux2-lora[optimizers]" in error.value.remedy
