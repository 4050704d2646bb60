"""Stopping, failing and going on: what a run survives, what it refuses, and what it leaves."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flux2_lora.inference.previews import Previewer
from flux2_lora.training import step as steps
from flux2_lora.training.claim import claimed
from flux2_lora.training.state import latest_checkpoint
from tests.conftest import Command
from tests.programs.conftest import SHORT
from tests.sets import picture

ROOT = Path(__file__).parents[2]
FULL = ("batch_size=2", "grad_accumulation=2", "optimizer.ema_decay=0.9", "dataset.caption_dropout=0.3", "device=cpu")
QUICK = ("preview.every=0", "validation.every=0", "checks=false", *FULL)


def rows_of(name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in Path(f"outputs/{name}/metrics.jsonl").read_text().splitlines()]


def losses_of(name: str) -> list[float]:
    return [row["loss"] for row in rows_of(name) if "loss" in row]


def files_of(name: str, step: int) -> dict[str, bytes]:
    folder = Path(f"outputs/{name}/checkpoints/step-{step:06d}")
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def steps_of(name: str) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in Path(f"outputs/{name}/checkpoints").glob("step-*"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for number in range(5):
        picture(tmp_path / "set" / f"{number}.png", f"picture {number}", colour=("red", "blue", "green")[number % 3])
    return tmp_path / "set"


def test_with_average_dropout_and_accumulation_a_resumed_run_has_the_same_bytes(command: Command) -> None:
    assert command("train", *QUICK, "max_steps=3", "name=whole").code == 0
    assert command("train", *QUICK, "max_steps=1", "name=parted").code == 0
    assert command("train", *QUICK, "max_steps=3", "name=parted").code == 0
    assert files_of("parted", 3) == files_of("whole", 3)
    assert files_of("whole", 3).keys() == {"adapter.safetensors", "trained.safetensors", "optimizer.safetensors"}
    assert losses_of("parted") == losses_of("whole")


def test_loader_workers_change_no_bit(command: Command) -> None:
    assert command("train", *QUICK, "max_steps=3", "name=alone").code == 0
    assert command("train", *QUICK, "max_steps=3", "name=helped", "loader_workers=2").code == 0
    assert files_of("helped", 3) == files_of("alone", 3)
    assert losses_of("helped") == losses_of("alone")


@pytest.mark.slow
def test_killed_runs_go_on_as_if_they_had_not_been(tmp_path: Path) -> None:
    """Six of the kills of scripts/prove_resume.py, inside saves and anywhere, two of them of two processes."""
    proof = subprocess.run(
        [sys.executable, ROOT / "scripts/prove_resume.py", "--kills", "6", "--processes", "1", "2", "--workers", "0"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "6 of 6 resumed runs end as the uninterrupted one" in proof.stdout, proof.stdout + proof.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_on_all_processes_of_a_terminal_ends_the_step_and_saves(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """With loader workers, which a terminal's Ctrl-C reaches as well; SIGTERM is sent to the run alone."""
    options = (*QUICK, "max_steps=500", "loader_workers=2", "name=stopped")
    run = subprocess.Popen(
        [sys.executable, "-m", "flux2_lora", "train", *options],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert run.stdout is not None
    for line in run.stdout:
        if line.startswith("at this rate"):
            (os.killpg if number == signal.SIGINT else os.kill)(run.pid, number)
            break
    said = run.stdout.read()
    assert run.wait() == code
    step = int(said.partition("stopped after step ")[2].partition(";")[0])
    assert shlex.join(["flux2-lora", "train"]) in said
    assert "name=stopped" in said
    found = latest_checkpoint(tmp_path / "outputs/stopped")
    assert found is not None
    assert found.step == step < 500


def test_other_pictures_are_noticed_and_refused_until_allowed(command: Command, pictures: Path) -> None:
    options = (*QUICK, f"dataset.folder={pictures}", "name=mine")
    assert command("train", *options, "max_steps=1").code == 0
    (pictures / "0.txt").write_text("another caption")
    refused = command("train", *options, "max_steps=2")
    assert refused.code == 2
    assert "name=mine was begun with other pictures, captions or masks" in refused.err
    assert command("train", *options, "max_steps=2", "allow_change=true").code == 0
    assert steps_of("mine") == [1, 2]


def test_allowed_changes_are_listed_and_impossible_ones_stay_refused(command: Command) -> None:
    assert command("train", *QUICK, "max_steps=1", "name=run", "optimizer.lr=0.0003").code == 0
    allowed = command("train", *QUICK, "max_steps=2", "name=run", "optimizer.lr=0.001", "allow_change=true")
    assert allowed.code == 0
    assert "going on with other options: optimizer.lr: 0.0003 -> 0.001" in allowed.out
    refused = command("train", *QUICK, "max_steps=2", "name=run", "adapter.rank=4", "allow_change=true")
    assert refused.code == 2
    assert "adapter.rank: 16 -> 4" in refused.err
    assert "allow_change" not in refused.err


def test_the_last_and_the_best_checkpoints_stay(command: Command) -> None:
    options = ("max_steps=6", "checkpoint_every=1", "keep_last=2", "validation.every=2", "validation.most=2")
    assert command("train", *SHORT[1:2], *options, "checks=false", "batch_size=4", "device=cpu", "name=kept").code == 0
    best = min(
        (row for row in rows_of("kept") if row.get("validation_loss") and row["step"]),
        key=lambda r: r["validation_loss"],
    )
    assert steps_of("kept") == sorted({5, 6, int(best["step"])})


def test_a_run_that_is_begun_again_forgets_the_old_one(command: Command) -> None:
    assert command("train", *QUICK, "max_steps=3", "name=again").code == 0
    assert command("train", *QUICK, "max_steps=1", "name=again", "resume=never").code == 0
    assert steps_of("again") == [1]
    assert len(losses_of("again")) == 1


def test_a_second_run_in_the_folder_is_refused_and_touches_nothing(command: Command, tmp_path: Path) -> None:
    with claimed(tmp_path / "outputs/busy"):
        refused = command("train", *QUICK, "max_steps=1", "name=busy")
    assert refused.code == 2
    assert f"another process (pid {os.getpid()}" in refused.err
    assert not (tmp_path / "outputs/busy").exists()


def test_refused_options_leave_no_folder(command: Command, tmp_path: Path) -> None:
    assert command("train", "timesteps.min_sigma=0.9", "timesteps.max_sigma=0.1").code == 2
    assert not (tmp_path / "outputs").exists()


@pytest.fixture
def bad_steps(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the loss of the given calls of `training_loss` not a number."""
    real = steps.training_loss

    def plant(calls: set[int]) -> None:
        made = iter(range(1000))

        def loss(*arguments: Any, **options: Any) -> torch.Tensor:
            value = real(*arguments, **options)
            return value * torch.nan if next(made) in calls else value

        monkeypatch.setattr(steps, "training_loss", loss)

    return plant


def test_a_step_that_is_not_finite_is_left_out_and_counted(command: Command, bad_steps: Callable[..., None]) -> None:
    bad_steps({2, 3})
    plain = ("preview.every=0", "validation.every=0", "checks=false", "device=cpu", "batch_size=2", "name=holes")
    assert command("train", *plain, "max_steps=5").code == 0
    rows = [row for row in rows_of("holes") if "lr" in row]
    assert [row.get("skipped", 0) for row in rows] == [0, 0, 1, 2, 2]
    assert all(
        torch.isfinite(t).all() for t in load_file("outputs/holes/checkpoints/step-000005/adapter.safetensors").values()
    )


def test_ten_of_them_in_a_row_end_the_run_with_the_last_good_adapter_kept(
    command: Command, bad_steps: Callable[..., None]
) -> None:
    plain = ("preview.every=0", "validation.every=0", "checks=false", "device=cpu", "batch_size=1", "max_steps=20")
    bad_steps(set(range(3, 100)))
    ended = command("train", *plain, "name=lost")
    assert ended.code == 1
    assert "not finite in 10 steps in a row, up to step 13" in ended.err
    assert "Traceback" not in ended.err
    bad_steps(set())
    assert command("train", *plain[:-1], "max_steps=3", "name=good").code == 0
    kept = load_file(f"outputs/lost/checkpoints/step-{steps_of('lost')[-1]:06d}/adapter.safetensors")
    good = load_file("outputs/good/checkpoints/step-000003/adapter.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in good.items())


def test_a_full_disk_ends_the_run_with_the_bytes_that_it_needs(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("train", *QUICK, "max_steps=1", "name=full").code == 0
    opened = os.fdopen

    def fdopen(handle: int, *how: Any, **options: Any) -> Any:
        name = str(Path(f"/proc/self/fd/{handle}").readlink())
        if "step-000002" in name and "optimizer" in name:
            os.close(handle)
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(handle, *how, **options)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdopen", fdopen)
        ended = command("train", *QUICK, "max_steps=2", "name=full")
    assert ended.code == 1
    assert "the disk is full" in ended.err
    assert "Traceback" not in ended.err
    kept = latest_checkpoint(Path("outputs/full"))
    assert kept is not None
    assert kept.step == 1
    assert [path.name for path in kept.folder.parent.iterdir()] == ["step-000001"]


def test_a_preview_that_fails_does_not_end_the_run(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Previewer, "draw", fail)
    ended = command("train", *SHORT, "preview.every=2", "checks=false", "name=blind")
    assert ended.code == 0
    assert "no preview at step 2: out of memory" in ended.out


def test_a_run_ends_early_when_it_has_waited_long_enough(command: Command) -> None:
    """At a rate that moves nothing, so that the first evaluation stays the best."""
    options = (
        "device=cpu",
        "batch_size=2",
        "preview.every=0",
        "checks=false",
        "optimizer.lr=1e-30",
        "optimizer.warmup_steps=0",
    )
    ended = command("train", *options, "validation.every=1", "validation.patience=2", "max_steps=9", "name=early")
    assert ended.code == 0
    judged = [row for row in rows_of("early") if "validation_loss" in row]
    best = min(judged[1:], key=lambda row: row["validation_loss"])
    assert judged[-1]["step"] == best["step"] + 2 < 9
    assert (Path("outputs/early/export/early.safetensors")).is_file()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["preview.guidance=3.5"], "this model has not"),
        (["preview.negative_prompt=blurred", "preview.cfg_scale=1"], "does nothing at preview.cfg_scale=1"),
        (["loss.preserve=1"], "loss.preserve needs a trigger word"),
        (["optimizer=schedule_free", "optimizer.schedule=cosine"], "in place of a schedule"),
        (["optimizer=paged_adamw8bit", "device=cpu"], "pages between a CUDA device"),
        (["validation.every=0", "validation.patience=2"], "nothing to wait for"),
        (["optimizer.block_lr=[double[7:9]:2]"], "the model has no such block"),
        (["processes=2"], "this run has 1 processes, and 2 were asked for"),
        (["timesteps.min_sigma=0.7", "timesteps.max_sigma=0.7"], "is not below"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused(command: Command, options: list[str], text: str) -> None:
    refused = command("train", *options)
    assert refused.code == 2
    assert text in refused.err
    assert len(refused.err.splitlines()) == 2
    assert not Path("outputs/demo").exists()
