"""Sweeps: one command, a run for each combination of options, and a page that compares them."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra.core.config_store import ConfigStore
from PIL import Image
from safetensors.torch import load_file

from flux2_lora import cli
from flux2_lora.bundled import share
from flux2_lora.training.progress import StepBar
from flux2_lora.training.tracking import read_metrics
from tests.conftest import Command, Outcome

# Two steps on four pictures, and a look at two prompts and two pictures at both ends.
SHORT = (
    *("dataset.folder=pictures", "max_steps=2", "batch_size=4", "device=cpu", "checks=false"),
    *("validation.every=2", "validation.base_style=0", "validation.nearest=false"),
    *("preview.every=2", "preview.steps=2", "preview.count=2", "preview.edits=false"),
)
# The second target is misspelt, which no run knows before it has started.
SWEEP = ("--multirun", "name=trial", "adapter.rank=4,8", "adapter.targets=[attention],[atention]")


@dataclass(frozen=True)
class Swept:
    """A sweep of four runs, of which two fail, and the folder in which it was started."""

    outcome: Outcome
    here: Path

    def adapter(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.here / f"outputs/{name}/checkpoints/step-000002/adapter.safetensors")


def run(here: Path, *arguments: str) -> Outcome:
    """`flux2-lora train <arguments>` in a folder, in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.chdir(here), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(["train", *arguments])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
    return Outcome(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Swept:
    here = tmp_path_factory.mktemp("sweep")
    demo, own = share() / "data/demo", here / "pictures"
    (own / "validation").mkdir(parents=True)
    shutil.copy(demo / "prompts.txt", own)
    for folder, most in ((Path(), 4), (Path("validation"), 2)):
        for picture in sorted((demo / folder).glob("*.png"))[:most]:
            for file in (picture, picture.with_suffix(".txt")):
                shutil.copy(file, own / folder)
    return Swept(run(here, *SWEEP, *SHORT), here)


GOOD, BAD = ("trial-rank=4-targets=attention", "trial-rank=8-targets=attention"), "trial-rank=4-targets=atention"


def test_each_run_has_a_folder_named_after_what_is_swept_and_hydra_has_none(swept: Swept) -> None:
    assert sorted(path.name for path in swept.here.iterdir()) == ["outputs", "pictures"]
    made = {path.name for path in (swept.here / "outputs").iterdir() if (path / "run.yaml").is_file()}
    assert made == set(GOOD)
    page = yaml.safe_load((swept.here / "outputs/trial-sweep/multirun.yaml").read_text())
    assert "adapter.rank=4,8" in page["hydra"]["overrides"]["task"]


def test_a_run_that_fails_does_not_end_the_sweep_and_is_named_at_its_end(swept: Swept) -> None:
    assert swept.outcome.code == 1
    assert "Traceback" not in swept.outcome.err
    what, remedy = swept.outcome.err.strip().splitlines()[-2:]
    assert what.startswith("error: 2 of 4 runs failed: ")
    assert BAD in what
    assert "'atention'" in what
    assert remedy == "  hint: the same command tries them again; runs that are done end at once"


def test_the_page_has_the_runs_by_validation_loss_and_the_failed_ones_with_their_reason(swept: Swept) -> None:
    page = (swept.here / "outputs/trial-sweep/comparison.md").read_text()
    rows = [line.split() for line in page.splitlines() if line.startswith("| ") and "trial-" in line]
    best = {name: losses_of(swept.here / "outputs" / name)[-1] for name in GOOD}
    assert [row[3] for row in rows[:2]] == sorted(GOOD, key=best.__getitem__)
    assert all("atention" in row[3] for row in rows[2:])
    assert page.count("adapter.targets names 'atention'") == 2
    assert f"{best[rows[0][3]]:.4f}" in rows[0]
    assert rows[0][3] in swept.outcome.out


def test_the_sheet_shows_the_base_and_both_runs_by_two_prompts(swept: Swept) -> None:
    with Image.open(swept.here / "outputs/trial-sweep/comparison.png") as sheet:
        assert sheet.size == (150 + 3 * 266 + 20, 44 + 26 + 2 * 266 + 10)


def test_a_run_of_a_sweep_is_the_run_that_it_would_be_alone(swept: Swept) -> None:
    """The second one, which ran where another had run before."""
    alone = run(swept.here, "name=alone", "adapter.rank=8", "adapter.targets=[attention]", *SHORT)
    assert alone.code == 0
    one, other = swept.adapter("alone"), swept.adapter(GOOD[1])
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_same_sweep_again_trains_only_what_is_not_done(swept: Swept) -> None:
    done, undone = (swept.here / "outputs" / name for name in GOOD)
    before = (done / "metrics.jsonl").read_text(), losses_of(undone)
    (undone / "checkpoints/step-000002").rename(undone / "checkpoints/lost")
    again = run(swept.here, *SWEEP, *SHORT)
    assert again.code == 1
    assert again.out.count("step 2/2") == 1
    assert (done / "metrics.jsonl").read_text() == before[0]
    assert losses_of(undone) == before[1]


def losses_of(folder: Path) -> list[float]:
    return [row["validation_loss"] for row in read_metrics(folder / "metrics.jsonl") if "validation_loss" in row]


def test_ctrl_c_ends_the_sweep_and_not_just_the_run(swept: Swept, monkeypatch: pytest.MonkeyPatch) -> None:
    def update(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(StepBar, "update", update)
    stopped = run(swept.here, "-m", "name=stopped", "adapter.rank=4,8", *SHORT)
    assert stopped.code == 130
    assert (swept.here / "outputs/stopped-rank=4/checkpoints/step-000001").is_dir()
    assert not (swept.here / "outputs/stopped-rank=8").exists()
    assert not (swept.here / "outputs/stopped-sweep/comparison.md").exists()


@pytest.mark.parametrize(
    ("options", "what", "remedy"),
    [
        (["adapter.rank=4,0"], "adapter.rank=0 is out of range", "at least 1"),
        (["adapter.rank=4,8", "seed=0,x"], "seed=x is not a whole number", ""),
        (["adapter.rnak=4,8"], "adapter.rnak is not an option", "did you mean adapter.rank?"),
        (["optimizer=adamw,adamv"], "optimizer=adamv is not a choice", "did you mean adamw?"),
        (["model=tiny,flux2_small"], "model.path must be given", "model.path="),
        (["seed=0,1 ,"], "seed=0,1 , is neither a value", "a,b,c"),
        (["seed=interval(0,1)"], "seed=interval(0,1) is neither a value", "a,b,c"),
        (["hydra/launcher=slurm"], "hydra/launcher=slurm is not a choice", "submitit_slurm"),
        (
            ["hydra/launcher=submitit_local", "hydra.launcher.timeout_mim=9"],
            "hydra.launcher.timeout_mim is not an option",
            "did you mean hydra.launcher.timeout_min?",
        ),
        # Where the cluster's own commands are missing.
        (["hydra/launcher=submitit_slurm"], "hydra/launcher: Could not detect", ""),
        # What only the runs find out, each for itself.
        (["dataset.folder='a, b'", "seed=0,1"], "dataset.folder=a, b does not exist", ""),
        (["dataset.folder=a=b (1),{c}"], "dataset.folder=a=b (1) does not exist", ""),
    ],
)
def test_a_wrong_option_of_a_sweep_is_named_before_anything_is_written(
    command: Command, tmp_path: Path, options: list[str], what: str, remedy: str
) -> None:
    outcome = command("train", "--multirun", *options)
    assert outcome.code == 2
    first, second, *_ = outcome.err.strip().splitlines()
    assert first.startswith("error: ")
    assert what in first
    assert second.startswith("  hint: ")
    assert remedy in second
    assert "Traceback" not in outcome.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["seed=0,1"], ["none-seed=0", "none-seed=1"]),
        (["seed=0,1", "adapter.rank=4"], ["none-seed=0", "none-seed=1"]),
        (["seed=0,1", "optimizer.lr=1e-4,5e-4", "name=x"], ["x-seed=0-lr=0.0001", "x-seed=1-lr=0.0005"]),
        (["name=a,b"], ["a", "b"]),
        (["name=a,b", "seed=0,1"], ["a-seed=0", "b-seed=1"]),
        (["preview.steps=2,3", "model.steps=4,5"], ["none-preview.steps=2-model.steps=4"]),
        (["adapter.targets=[attention],[mlp]"], ["none-targets=attention", "none-targets=mlp"]),
        (["seed=0,0"], ["none"]),
    ],
)
def test_runs_are_called_by_the_options_in_which_they_differ(
    command: Command, options: list[str], names: list[str]
) -> None:
    said = command("train", "--multirun", "dataset.folder=none", *options).out.splitlines()
    started = [line.partition(": ")[2] for line in said if line.startswith("run ")]
    assert set(names) <= set(started)
    assert len(started) == len(set(started))


def test_a_list_without_brackets_is_answered_with_both_things_that_it_may_mean(command: Command) -> None:
    assert "write a list as [a,b]; add --multirun" in command("train", "adapter.rank=4,8").err


def test_a_launcher_without_a_sweep_is_refused(command: Command) -> None:
    refused = command("train", "hydra/launcher=submitit_slurm")
    assert refused.code == 2
    assert "add --multirun" in refused.err


def test_a_launcher_that_is_not_installed_is_answered_with_the_extra(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(ConfigStore.instance().repo["hydra"]["launcher"], "submitit_slurm.yaml")
    refused = command("train", "--multirun", "seed=0,1", "hydra/launcher=submitit_slurm")
    assert refused.code == 2
    assert "hint: pip install 'flux2-lora[cluster]'" in refused.err


def test_a_sweep_is_refused_in_several_processes(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command("train", "--multirun", "seed=0,1").code == 2


@pytest.mark.slow
def test_a_launcher_runs_the_jobs_elsewhere_and_the_page_is_made_when_all_have_ended(swept: Swept) -> None:
    launcher = ("hydra/launcher=submitit_local", "hydra.launcher.timeout_min=20")
    options = ("--multirun", "name=elsewhere", "adapter.targets=[attention],[atention]", "adapter.rank=8")
    started = subprocess.run(
        [sys.executable, "-m", "flux2_lora", "train", *options, *launcher, *SHORT],
        capture_output=True,
        text=True,
        check=False,
        cwd=swept.here,
    )
    assert started.returncode == 1, started.stderr
    sweep = swept.here / "outputs/elsewhere-sweep"
    page = (sweep / "comparison.md").read_text()
    assert page.index("elsewhere-targets=attention ") < page.index("elsewhere-targets=atention ")
    assert "adapter.targets names 'atention'" in page
    assert len(list(sweep.glob(".submitit/*/*_log.out"))) == 2
    one, other = swept.adapter("elsewhere-targets=attention"), swept.adapter(GOOD[1])
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert sorted(path.name for path in swept.here.iterdir()) == ["outputs", "pictures"]
