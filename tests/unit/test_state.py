"""Checkpoints: whole or absent, damaged ones passed over, the best one kept, a full disk survived."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flux2_lora.adapters import AdapterSpec, attach
from flux2_lora.errors import RunError, UserError
from flux2_lora.families import ModelFamily
from flux2_lora.training.optimizers import OptimizerSpec
from flux2_lora.training.state import (
    TrainState,
    delete_all,
    latest_checkpoint,
    open_checkpoint,
    prune_checkpoints,
    restore,
    save_checkpoint,
    set_aside,
)
from tests.runs import adapter_of, built, step

FILES = ["adapter.safetensors", "trained.safetensors", "optimizer.safetensors", "state.json"]


@pytest.fixture
def state(transformer: nn.Module) -> TrainState:
    attach(transformer, "flux2", AdapterSpec(rank=2), seed=0)
    made = built(transformer, OptimizerSpec(ema_decay=0.9))
    step(made, 0)
    return made


def save(run: Path, state: TrainState, family: ModelFamily, *steps: int) -> None:
    for number in steps:
        state.step = number
        save_checkpoint(run, state, adapter_of(state, family), {"data": "abc"})


def steps_in(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def test_average_counters_and_facts_come_back(state: TrainState, family: ModelFamily, tmp_path: Path) -> None:
    state.skipped, state.failing = 3, 2
    save(tmp_path, state, family, 5)
    assert state.ema is not None
    average = [tensor.clone() for tensor in state.ema.average]
    fresh = built(state.transformer, OptimizerSpec(ema_decay=0.9))
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.facts == {"data": "abc"}
    restore(checkpoint, fresh)
    assert (fresh.step, fresh.skipped, fresh.failing) == (5, 3, 2)
    assert fresh.ema is not None
    assert fresh.ema.updates == state.ema.updates
    assert all(torch.equal(one, other) for one, other in zip(average, fresh.ema.average, strict=True))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "gone"])
def test_a_checkpoint_with_one_damaged_file_is_passed_over_and_named(
    state: TrainState, family: ModelFamily, tmp_path: Path, name: str, damage: str
) -> None:
    save(tmp_path, state, family, 1, 2)
    file = tmp_path / "checkpoints/step-000002" / name
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes({"flipped": bytes(raw), "cut": bytes(raw[:-9]), "empty": b""}[damage])
    told: list[Path] = []
    found = latest_checkpoint(tmp_path, told.append)
    assert found is not None
    assert found.step == 1
    assert [path.name for path in told] == ["step-000002"]
    with pytest.raises(UserError, match="is not a whole checkpoint"):
        open_checkpoint(tmp_path / "checkpoints/step-000002")


def test_an_unfinished_checkpoint_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "checkpoints/step-000009").mkdir(parents=True)
    assert latest_checkpoint(tmp_path) is None


def test_the_last_ones_and_the_best_one_are_kept(state: TrainState, family: ModelFamily, tmp_path: Path) -> None:
    save(tmp_path, state, family, 1, 2, 3, 4, 5)
    prune_checkpoints(tmp_path, keep_last=2, best=2)
    assert steps_in(tmp_path) == [2, 4, 5]
    prune_checkpoints(tmp_path, keep_last=0, best=None)
    assert steps_in(tmp_path) == [2, 4, 5]


def test_a_run_that_is_begun_again_keeps_no_checkpoint_of_the_old_one(
    state: TrainState, family: ModelFamily, tmp_path: Path
) -> None:
    save(tmp_path, state, family, 1, 2)
    (tmp_path / "checkpoints/.step-000003.part").mkdir()
    delete_all(tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_later_checkpoints_are_out_of_the_way_of_a_run_that_goes_on_before_them(
    state: TrainState, family: ModelFamily, tmp_path: Path
) -> None:
    save(tmp_path, state, family, 1, 2, 3)
    (tmp_path / "checkpoints/step-000003/state.json").write_text("{}")
    set_aside(tmp_path, 1)
    save(tmp_path, state, family, 2)
    prune_checkpoints(tmp_path, keep_last=1, best=None)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        "step-000002",
        "aside-step-000002",
        "aside-step-000003",
    }


def test_numbers_that_are_not_finite_are_never_saved(state: TrainState, family: ModelFamily, tmp_path: Path) -> None:
    save(tmp_path, state, family, 1)
    assert state.ema is not None
    state.ema.average[0].view(-1)[0] = torch.nan
    with pytest.raises(RunError, match="not finite after step 2"):
        save(tmp_path, state, family, 2)
    assert steps_in(tmp_path) == [1]


class FullDisk:
    """A disk that is full from the n-th write of a file on."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def __call__(self, handle: int, *how: Any, **options: Any) -> Any:
        self.calls -= 1
        if self.calls < 0:
            os.close(handle)
            raise OSError(errno.ENOSPC, "No space left on device")
        return _fdopen(handle, *how, **options)


_fdopen = os.fdopen


@pytest.mark.parametrize("writes", [0, 1, 2, 3])
def test_a_full_disk_leaves_the_old_checkpoint_and_names_the_bytes(
    state: TrainState, family: ModelFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    save(tmp_path, state, family, 1)
    monkeypatch.setattr(os, "fdopen", FullDisk(writes))
    with pytest.raises(RunError, match=r"the disk is full: .* needs [\d,]+ bytes, [\d,]+ are free"):
        save(tmp_path, state, family, 2)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
