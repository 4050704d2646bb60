"""What a run says of itself in a few lines: how it draws noise levels, how long it will take, what it learned."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from flux2_lora.flow import TimestepSpec, part_below, sigma_above
from flux2_lora.training.ranking import ranked_table, verdict
from flux2_lora.training.state import latest_checkpoint
from flux2_lora.training.tracking import read_metrics

_BINS = 16
_BARS = "▁▂▃▄▅▆▇█"


def noise_levels(spec: TimestepSpec, mu: float) -> str:
    """A histogram of the density from sigma 0 to 1, and its median: "0 ▁▂▅█▆▃▁ 1, median 0.62"."""
    low, high = (part_below(spec, mu, sigma) for sigma in (spec.min_sigma, spec.max_sigma))
    edges = [min(max(place / _BINS, spec.min_sigma), spec.max_sigma) for place in range(_BINS + 1)]
    below = [part_below(spec, mu, edge) for edge in edges]
    parts = [(after - before) / (high - low) for before, after in pairwise(below)]
    bars = "".join(_BARS[round(part / max(parts) * (len(_BARS) - 1))] if part > 0 else " " for part in parts)
    median = sigma_above(spec, mu, (low + high) / 2)
    return f"0 {bars} 1, median {median:.2f}"


def estimate(step_s: float, steps_left: int, peak_bytes: int) -> str:
    """How long a run will take by the steps seen so far, evaluations and previews aside."""
    return (
        f"{step_s:.2f} s a step, {duration(step_s * steps_left)} for {steps_left} steps, {peak_bytes / 2**30:.1f} GiB"
    )


def duration(seconds: float) -> str:
    """As people say it: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def summary(run: Path, export: Path, following: str) -> list[str]:
    """What was learned, which checkpoint is best, where everything lies, and the command that follows."""
    rows = read_metrics(run / "metrics.jsonl")
    losses = [row["validation_loss"] for row in rows if "validation_loss" in row]
    newest = max((run / "previews").glob("step-*.png"), default=None)
    last, judged = latest_checkpoint(run), verdict(rows)
    lines = ["learned   no validation pictures, so no validation loss"]
    if losses:
        learned = f"{losses[0]:.3f} (base) -> {losses[-1]:.3f}, {losses[-1] / losses[0]:.2f} x"
        lines = [ranked_table(rows, run), f"learned   validation loss {learned}"]
    if judged is not None and last is not None and judged.best != last.step:
        best = run / "checkpoints" / f"step-{judged.best:06d}"
        told = f"; flux2-lora export adapter={best} output={run / 'export' / 'best.safetensors'}"
        lines.append(f"best      step {judged.best}, {judged.loss:.3f}{told if best.is_dir() else ''}")
    return [
        *lines,
        f"grid      {newest or 'previews are off (preview.every=0)'}",
        f"adapter   {last.folder if last else run}",
        f"export    {export}",
        f"next      {following}",
    ]
