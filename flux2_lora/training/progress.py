"""What a run shows people: lines, bars, and how much memory it takes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self, TypeVar

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")
console = Console(highlight=False, markup=False, soft_wrap=True)


def peak_bytes(device: torch.device) -> int:
    """Memory in bytes: the most allocated so far on a CUDA device, resident now in this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    memory = psutil.Process().memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))


def forget_peak(device: torch.device) -> None:
    """Count the most allocated from here on: an earlier run in this process is none of a later one's."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def counted(what: str, items: Iterable[Item], total: int) -> Iterator[Item]:
    """`items`, with a bar on a terminal; elsewhere a line every half minute, and one at the end."""
    columns = (TextColumn(what), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn())
    began = told = time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        for number, item in enumerate(items, start=1):
            yield item
            bar.advance(task)
            now = time.monotonic()
            if not console.is_terminal and (now - told > 30 or number == total):
                told = now
                console.print(f"{number} of {total} {what}, {now - began:.0f} s")


class StepBar:
    """A progress bar on a terminal; plain lines, a tenth of the run apart, elsewhere."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.live = total, console.is_terminal
        columns = (TextColumn("training"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        self._bar = Progress(*columns, TextColumn("{task.fields[text]}"), TimeRemainingColumn(), console=console)
        self._task: TaskID = self._bar.add_task("", total=total, completed=done, text="", visible=self.live)

    def __enter__(self) -> Self:
        if self.live:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self._bar.stop()

    def update(self, step: int, *, loss: float, validation: float | None, step_s: float, peak: int) -> None:
        parts = [f"loss {loss:.3f}", f"{step_s:.2f} s/step", f"{peak / 2**30:.1f} GiB"]
        if validation is not None:
            parts.insert(1, f"validation {validation:.3f}")
        text = "  ".join(parts)
        self._bar.update(self._task, completed=step, text=text)
        if not self.live and (step % max(self.total // 10, 1) == 0 or step == self.total):
            console.print(f"step {step}/{self.total}  {text}  {(self.total - step) * step_s:.0f} s left")
