"""A training stage that can stop at any minute and go on where it stopped, on a CPU or a GPU."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up, constant, then linear decay to zero over the last `decay` part of the steps."""

    steps: int
    lr: float
    warmup: int = 100
    decay: float = 0.5
    average: float = 0.998

    def at(self, step: int) -> float:
        left = (self.steps - step) / (self.steps * self.decay)
        return self.lr * min((step + 1) / self.warmup, left, 1.0)


def train_stage(
    module: nn.Module,
    schedule: Schedule,
    checkpoint: Path,
    loss_at: Callable[[torch.Generator], Tensor],
    report: Callable[[], dict[str, float]],
    *,
    minutes: float,
    every: int = 200,
) -> bool:
    """AdamW with an exponential moving average of the weights, which is what stays in `module`.

    Goes on from `checkpoint`, and writes it every `every` steps and when `minutes` are over; each step's draws come
    from a generator keyed by the step, so pieces give what one go gives. loss_at: generator -> scalar tensor.
    report: called on the averaged weights; what it tells is printed and kept beside the checkpoint, a JSON a line.
    Returns whether the stage is complete.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=schedule.lr, betas=(0.9, 0.98), weight_decay=0.01)
    average = {name: value.clone() for name, value in module.state_dict().items()}
    step, began, losses = 0, time.monotonic(), []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        average, step = state["average"], state["step"]
    while step < schedule.steps and time.monotonic() - began < 60 * minutes:
        for group in optimizer.param_groups:
            group["lr"] = schedule.at(step)
        loss = loss_at(torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        _follow(average, module, min(schedule.average, (step + 1) / (step + 10)))
        step += 1
        losses.append(loss.detach())
        if step % every == 0 or step == schedule.steps:
            _save(checkpoint, module, optimizer, average, step)
            live = {name: value.clone() for name, value in module.state_dict().items()}
            module.load_state_dict(average)
            with torch.no_grad():
                told = {"step": step, "loss": torch.stack(losses).mean().item(), **report()}
            with checkpoint.with_suffix(".jsonl").open("a") as log:
                log.write(json.dumps(told) + "\n")
            words = [f"{name} {value:.4g}" for name, value in told.items() if name != "step"]
            print(f"step {step}", *words, f"{time.monotonic() - began:.0f} s", flush=True)
            module.load_state_dict(live)
            losses.clear()
    _save(checkpoint, module, optimizer, average, step)
    module.load_state_dict(average)
    return step >= schedule.steps


def _follow(average: dict[str, Tensor], module: nn.Module, keep: float) -> None:
    with torch.no_grad():
        for name, value in module.state_dict().items():
            average[name].lerp_(value, 1 - keep) if value.is_floating_point() else average[name].copy_(value)


def _save(
    checkpoint: Path, module: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, Tensor], step: int
) -> None:
    state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": step}
    part = checkpoint.with_suffix(".part")
    torch.save(state, part)
    part.replace(checkpoint)
