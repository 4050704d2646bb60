"""A run and a drawing whose base is streamed leave the bytes of resident ones; memory that runs out is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flux2_lora.inference.previews import Previewer
from flux2_lora.offload import AtOnce, Offload
from flux2_lora.training import step
from flux2_lora.training.memory import MemorySpec
from tests.conftest import Command
from tests.programs.conftest import SHORT

STREAMED = ("memory=stream", "memory.resident_blocks=1", "memory.plain_blocks=2")


def numbers_of(run: Path) -> list[dict[str, float]]:
    """Rows of metrics without what time and memory they took."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("step_s", "peak_bytes", "time")} for row in rows]


def test_a_streamed_run_leaves_the_bytes_of_a_resident_one(
    trained: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the inputs of its recomputed blocks are copied away and back, as they are for a card."""
    asked: list[int] = []

    def allocate(size: int) -> torch.Tensor:
        asked.append(size)
        return torch.empty(size, dtype=torch.uint8)

    monkeypatch.setattr(MemorySpec, "offload", lambda *_: Offload(AtOnce(), allocate, least=0))
    options = (*SHORT, "preview.every=4", "preview.steps=2", "name=short", *STREAMED, "memory.host=disk")
    outcome = command("train", *options)
    assert outcome.code == 0, outcome.err
    assert "5 blocks are streamed from" in outcome.out
    run = Path("outputs/short")
    for name in ("checkpoints/step-000004/adapter.safetensors", "previews/step-000004/0000.png"):
        assert (run / name).read_bytes() == (trained / name).read_bytes(), name
    assert numbers_of(run) == numbers_of(trained)
    assert asked


@pytest.mark.parametrize("merged", ["true", "false"])
def test_pictures_of_a_streamed_base_are_those_of_a_resident_one(trained: Path, command: Command, merged: str) -> None:
    options = ("sample", "steps=2", "prompts=[red apple]", f"adapters=[{trained}]", f"merged={merged}", "device=cpu")
    for name, memory in (("resident", ()), ("streamed", ("memory=stream",))):
        outcome = command(*options, f"output={name}", *memory)
        assert outcome.code == 0, outcome.err
    assert Path("resident/0000.png").read_bytes() == Path("streamed/0000.png").read_bytes()


def test_memory_that_runs_out_in_a_preview_is_passed_over_and_in_a_step_ends_the_run_with_remedies(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    monkeypatch.setattr(Previewer, "draw", exhausted)
    monkeypatch.setattr(step, "velocity_error", exhausted)
    outcome = command("train", *SHORT, "preview.every=4", "validation.every=0", "checks=false", "name=short")
    assert outcome.code == 1
    assert "no preview at step 0: CUDA out of memory. Tried to allocate 1 GiB.; " in outcome.out
    assert "memory ran out in step 1" in outcome.err
    assert "batch_size=2 frees about" in outcome.err
    assert "memory.plain_blocks=0 frees about" in outcome.err


def test_a_run_follows_the_plan_for_its_budget_and_draws_the_same(trained: Path, command: Command) -> None:
    budget = ("hardware=8gb", "hardware.reserved_gb=0.001", "hardware.context_gb=0.001", "hardware.vram_gb=0.0265")
    outcome = command("train", *SHORT, "preview.every=4", "preview.steps=2", "name=short", *budget)
    assert outcome.code == 0, outcome.err
    assert "planned   streamed" in outcome.out
    assert "plan      a step takes" in outcome.out
    assert "blocks are streamed from" in outcome.out
    checkpoint = "checkpoints/step-000004/adapter.safetensors"
    assert (Path("outputs/short") / checkpoint).read_bytes() == (trained / checkpoint).read_bytes()


def test_a_budget_that_nothing_fits_is_refused_with_a_change(command: Command) -> None:
    outcome = command("train", *SHORT, "hardware=8gb", "hardware.vram_gb=0.9")
    assert outcome.code == 2
    assert "and a card of 8 GB has 0.3 GB to give" in outcome.err
    assert not Path("outputs/demo/run.yaml").exists()
