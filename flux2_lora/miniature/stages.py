"""A training stage that can stop at any minute and go on where it stopped, on a CPU or a GPU."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

PLAIN_STEPS = 3  # of a shape, before it is recorded: libraries choose their kernels in the first ones


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


class Step:
    """One step of an optimizer on some inputs. On a GPU it is recorded for each shape of these, and replayed.

    A miniature's kernels take less time than a host needs to launch them. loss_of: inputs -> scalar tensor.
    """

    def __init__(self, module: nn.Module, schedule: Schedule, loss_of: Callable[..., Tensor]) -> None:
        self.module, self.loss_of = module, loss_of
        self.device = next(module.parameters()).device
        self.cuda = self.device.type == "cuda"
        self.lr = torch.tensor(schedule.lr, device=self.device)  # what is recorded reads it at each replay
        self.optimizer = torch.optim.AdamW(
            module.parameters(), lr=self.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True, capturable=self.cuda
        )
        self.seen: Counter[object] = Counter()
        self.recorded: dict[object, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]] = {}

    def __call__(self, lr: float, *inputs: Tensor) -> Tensor:
        """The loss, before the step."""
        self.lr.fill_(lr)
        shapes = tuple(one.shape for one in inputs)
        self.seen[shapes] += 1
        if not self.cuda or self.seen[shapes] <= PLAIN_STEPS:
            return self._taken(inputs)
        if shapes not in self.recorded:
            graph, held = torch.cuda.CUDAGraph(), tuple(one.clone() for one in inputs)
            self.optimizer.zero_grad()
            with torch.cuda.graph(graph):
                loss = self._taken(held)
            self.recorded[shapes] = graph, held, loss
        graph, held, loss = self.recorded[shapes]
        for place, one in zip(held, inputs, strict=True):
            place.copy_(one)
        graph.replay()
        return loss.clone()

    def _taken(self, inputs: Sequence[Tensor]) -> Tensor:
        loss = self.loss_of(*inputs)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()


def train_stage(
    module: nn.Module,
    schedule: Schedule,
    checkpoint: Path,
    draw: Callable[[torch.Generator], Sequence[Tensor]],
    loss_of: Callable[..., Tensor],
    report: Callable[[], dict[str, float]],
    *,
    minutes: float,
    every: int = 200,
) -> bool:
    """AdamW with an exponential moving average of the weights, which is what stays in `module`.

    Goes on from `checkpoint`, and writes it every `every` steps and when `minutes` are over. draw: a generator on the
    device -> a step's inputs; the generator is keyed by the step, so pieces give what one go gives. loss_of: these
    inputs -> scalar tensor. report: called on the averaged weights; what it tells is printed and kept beside the
    checkpoint, a JSON a line. Returns whether the stage is complete.
    """
    take = Step(module, schedule, loss_of)
    average = {name: value.clone() for name, value in module.state_dict().items()}
    step, began, losses = 0, time.monotonic(), []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=take.device)
        module.load_state_dict(state["module"])
        take.optimizer.load_state_dict(state["optimizer"])
        take.optimizer.param_groups[0].update(lr=take.lr, capturable=take.cuda)  # it may come from another device
        average, step = state["average"], state["step"]
    while step < schedule.steps and time.monotonic() - began < 60 * minutes:
        generator = torch.Generator(take.device).manual_seed(step)
        losses.append(take(schedule.at(step), *draw(generator)))
        _follow(average, module, min(schedule.average, (step + 1) / (step + 10)))
        step += 1
        if step % every == 0 or step == schedule.steps:
            _save(checkpoint, module, take.optimizer, average, step)
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
    _save(checkpoint, module, take.optimizer, average, step)
    module.load_state_dict(average)
    return step >= schedule.steps


def _follow(average: dict[str, Tensor], module: nn.Module, keep: float) -> None:
    now = module.state_dict()
    moving = [name for name, value in now.items() if value.is_floating_point()]
    with torch.no_grad():
        torch._foreach_lerp_([average[name] for name in moving], [now[name] for name in moving], 1 - keep)
        for name in now.keys() - set(moving):
            average[name].copy_(now[name])


def _save(
    checkpoint: Path, module: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, Tensor], step: int
) -> None:
    state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "average": average, "step": step}
    part = checkpoint.with_suffix(".part")
    torch.save(state, part)
    part.replace(checkpoint)
