"""What a run tells: metrics.jsonl for machines, one line or a bar for people, wandb where it is wanted."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from flux2_lora.files import write_text
from flux2_lora.options import option

Item = TypeVar("Item")
console = Console(highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class LoggerSpec:
    """kind: jsonl (always written), or wandb beside it; wandb_project names the project there."""

    kind: str = option("jsonl", one_of=("jsonl", "wandb"))
    wandb_project: str = "flux2-lora"


class Metrics:
    """Appends one JSON object a row to metrics.jsonl, and to wandb when the spec says so."""

    def __init__(self, path: Path, spec: LoggerSpec, *, name: str, config: Mapping[str, Any], resumed_at: int) -> None:
        self.path = path
        kept = [row for row in read_metrics(path) if resumed_at > 0 and row["step"] <= resumed_at]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._wandb: Any = None
        if spec.kind == "wandb":
            import wandb

            self._wandb = wandb.init(project=spec.wandb_project, name=name, config=dict(config), dir=str(path.parent))

    def write(self, step: int, **values: float) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.jsonl; a last line cut short by a crash is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def peak_bytes(device: torch.device) -> int:
    """Memory in bytes: the most allocated so far on a CUDA device, resident now in this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    memory = psutil.Process().memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))


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
