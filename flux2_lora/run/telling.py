"""What a run tells the user: its base, its pace, what it learned or died of, and the command that comes next."""

from __future__ import annotations

import shlex

from torch import nn

from flux2_lora.config import arguments
from flux2_lora.dataset.spec import bundled_folder
from flux2_lora.errors import RunError
from flux2_lora.families import ModelFamily
from flux2_lora.inference.run_page import write_report
from flux2_lora.planning.choose import correct
from flux2_lora.planning.work import Plan
from flux2_lora.quantize import stored_bytes, trial_of
from flux2_lora.run_options import Budget, RunOptions
from flux2_lora.stream import streamer_of
from flux2_lora.training.progress import console
from flux2_lora.training.report import estimate, noise_levels, summary
from flux2_lora.training.state import TrainState


def tell_base(config: RunOptions, transformer: nn.Module, plan: Plan | None, *, targeted: int, of: int) -> None:
    """How the base is stored and multiplied, and where it lies. targeted: projections with an adapter, of so many."""
    console.print(
        f"base in {config.precision.base}: {stored_bytes(transformer) / 1e6:.1f} MB with the adapter; "
        f"LoRA on {targeted} of {of} projections, rank {config.adapter.rank}"
    )
    for part in (trial_of(transformer), streamer_of(transformer), plan):
        if part is not None:
            console.print(part.words)


def tell_noise_levels(config: RunOptions, family: ModelFamily) -> None:
    """The density that training draws noise levels from, at the side of the largest square."""
    side = config.dataset.side_px
    mu = family.training_mu((side // family.pixels_per_token) ** 2)
    console.print(f"noise levels at {side} px: {noise_levels(config.timesteps, mu)}")


def tell_pace(budget: Budget | None, steps_left: int, step_s: float, peak: int) -> None:
    """How long the run will take at this rate, and where the plan was wrong."""
    console.print(f"at this rate: {estimate(step_s, steps_left, peak)}")
    for line in correct(budget.plan, budget.card, step_s=step_s, peak_bytes=peak) if budget else ():
        console.print(f"plan      {line}")


def tell_result(config: RunOptions) -> None:
    """What was learned, where it lies, and the next command."""
    following = "flux2-lora train dataset.folder=~/pictures/mine dataset.trigger_word=mystyle name=mine"
    if config.dataset.folder != bundled_folder():
        model = [argument for argument in arguments() if argument.startswith(("model=", "model."))]
        following = shlex.join(["flux2-lora", "sample", *model, f"adapters=[{config.folder}]", 'prompts=["a prompt"]'])
    for line in summary(config.folder, config.exported, following):
        console.print(line)


def tell_report(config: RunOptions) -> None:
    """Write the page of the run. The adapter is exported by then: a disk that is full must not end the run badly."""
    try:
        console.print(f"report    {write_report(config.folder)}")
    except (OSError, RunError) as error:
        console.print(f"report    not written: {error}")


def tell_how_to_go_on(config: RunOptions, step: int, *, first: bool) -> None:
    """After a run that was stopped."""
    again = shlex.join(["flux2-lora", "train", *arguments()])
    console.print(f"stopped after step {step}; go on with\n  {again}")
    if first:
        tell_report(config)


def ran_away(config: RunOptions, state: TrainState) -> RunError:
    """What ends a run whose last steps were all left out."""
    return RunError(
        f"loss or gradient were not finite in {state.failing} steps in a row, up to step {state.step}",
        f"the adapter of step {state.step - state.failing} is kept in {config.folder / 'checkpoints'}; "
        "lower optimizer.lr",
    )
