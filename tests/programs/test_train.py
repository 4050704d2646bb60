"""The run from end to end on the bundled model: its losses, its files, its exactness."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from flux2_lora.training.progress import StepBar
from tests.conftest import Command
from tests.programs.conftest import SHORT

GOLDEN = Path(__file__).parents[1] / "golden" / "train_losses.json"


def rows_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def adapter_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoints/step-{step:06d}/adapter.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_four_steps_have_the_losses_they_always_had(trained: Path) -> None:
    losses = [row["loss"] for row in rows_of(trained) if "loss" in row]
    assert losses == pytest.approx(json.loads(GOLDEN.read_text())["loss"], rel=1e-3)


def test_validation_has_the_values_it_always_had(trained: Path) -> None:
    losses = [row["validation_loss"] for row in rows_of(trained) if "validation_loss" in row]
    assert losses == pytest.approx(json.loads(GOLDEN.read_text())["validation_loss"], rel=1e-3)
    assert [row["step"] for row in rows_of(trained) if "validation_loss" in row] == [0, 4]


def test_every_step_tells_what_the_contract_names(trained: Path) -> None:
    steps = [row for row in rows_of(trained) if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert all({"loss", "lr", "grad_norm", "step_s", "peak_bytes"} <= row.keys() for row in steps)


def test_a_run_leaves_options_grid_checkpoint_and_export(trained: Path) -> None:
    assert "max_steps: 4" in (trained / "run.yaml").read_text()
    with Image.open(trained / "previews" / "step-000004.png") as grid:
        assert min(grid.size) > 300
    assert (trained / "checkpoints/step-000004/state.json").is_file()
    with safe_open(trained / "export/short.safetensors", framework="pt") as file:
        assert all(key.startswith("lora_unet_") for key in file.keys())  # noqa: SIM118 - not a dict


def test_no_line_of_the_run_shows_a_path_of_the_machine_in_the_exported_header(trained: Path) -> None:
    with safe_open(trained / "export/short.safetensors", framework="pt") as file:
        assert str(trained.parent) not in json.dumps(file.metadata())


def test_previews_do_not_disturb_training(trained: Path, command: Command) -> None:
    assert command("train", *SHORT, "name=blind", "validation.every=0").code == 0
    assert same(adapter_of(Path("outputs/blind"), 4), adapter_of(trained, 4))


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(trained: Path, command: Command) -> None:
    short = [option for option in SHORT if not option.startswith("max_steps")]
    assert command("train", *short, "max_steps=2", "name=short").code == 0
    resumed = command("train", *short, "max_steps=4", "name=short")
    assert "going on from" in resumed.out
    run = Path("outputs/short")
    assert same(adapter_of(run, 4), adapter_of(trained, 4))
    assert [row["loss"] for row in rows_of(run) if "loss" in row] == [
        row["loss"] for row in rows_of(trained) if "loss" in row
    ]


def test_a_damaged_checkpoint_is_passed_over(trained: Path, command: Command) -> None:
    short = [option for option in SHORT if not option.startswith("max_steps")]
    assert command("train", *short, "max_steps=2", "checkpoint_every=1", "name=hurt").code == 0
    last = Path("outputs/hurt/checkpoints/step-000002/adapter.safetensors")
    raw = bytearray(last.read_bytes())
    raw[-1] ^= 1
    last.write_bytes(raw)
    resumed = command("train", *short, "max_steps=4", "checkpoint_every=1", "name=hurt")
    assert "step-000001" in resumed.out
    assert same(adapter_of(Path("outputs/hurt"), 4), adapter_of(trained, 4))


def test_a_name_with_other_options_is_refused_and_both_values_are_named(command: Command) -> None:
    assert command("train", *SHORT, "name=taken", "max_steps=1").code == 0
    refused = command("train", *SHORT, "name=taken", "optimizer.lr=0.01")
    assert refused.code == 2
    assert "optimizer.lr: 0.0006 -> 0.01" in refused.err


def test_accumulated_small_batches_learn_from_as_many_pictures(command: Command) -> None:
    options = [option for option in SHORT if not option.startswith("batch_size")]
    assert command("train", *options, "batch_size=2", "grad_accumulation=2", "name=small", "max_steps=1").code == 0
    assert len([row for row in rows_of(Path("outputs/small")) if "loss" in row]) == 1


def test_sigterm_ends_the_run_after_a_checkpoint_to_go_on_from(
    trained: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = StepBar.update

    def update(bar: StepBar, step: int, **values: Any) -> None:
        shown(bar, step, **values)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(StepBar, "update", update)
        stopped = command("train", *SHORT, "name=stopped")
    assert stopped.code == 128 + signal.SIGTERM
    assert "stopped after step 2" in stopped.out
    assert command("train", *SHORT, "name=stopped").code == 0
    assert same(adapter_of(Path("outputs/stopped"), 4), adapter_of(trained, 4))


def test_evaluations_tell_what_is_forgotten_and_how_near_the_pictures_are(trained: Path) -> None:
    measured = [row for row in rows_of(trained) if "validation_loss" in row]
    assert all({"base_style_loss", "nearest"} <= row.keys() for row in measured)
    assert all(row["base_style_loss"] < row["validation_loss"] for row in measured)
    assert all(-1 <= row["nearest"] <= 1 for row in measured)


def test_pictures_can_be_compared_by_an_image_encoder_at_hand(command: Command, tmp_path: Path) -> None:
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(tmp_path / "dino")
    processor = BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(tmp_path / "dino")
    options = ("max_steps=1", "batch_size=2", "preview.every=1", "preview.steps=2", "validation.every=0", "device=cpu")
    assert command("train", *options, f"validation.features={tmp_path / 'dino'}", "name=seen", "checks=false").code == 0
    near = [row["nearest"] for row in rows_of(Path("outputs/seen")) if "nearest" in row]
    assert len(near) == 2
    refused = command("train", *options, f"validation.features={tmp_path / 'nothing'}", "name=blind")
    assert refused.code == 2
    assert "validation.features" in refused.err


def test_previews_need_no_more_memory_than_training(tmp_path: Path) -> None:
    """Eight pictures are drawn where a step holds four; each run is a process of its own, since a peak only grows."""
    peaks = {}
    for every in (0, 3):
        command = [sys.executable, "-m", "flux2_lora", "train", "max_steps=3", "batch_size=4", "checks=false"]
        options = [f"preview.every={every}", "preview.count=8", "preview.steps=2", "validation.every=0", "device=cpu"]
        arguments = [*command, *options, f"name=every{every}"]
        told = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert told.returncode == 0, told.stderr
        peaks[every] = max(row.get("peak_bytes", 0) for row in rows_of(tmp_path / "outputs" / f"every{every}"))
    assert peaks[3] <= 1.03 * peaks[0]
