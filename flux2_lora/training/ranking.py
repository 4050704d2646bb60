"""Which checkpoint is best: a table of what was measured at each step, ranked by the loss on held-out pictures.

Everything is read off the rows of metrics.jsonl, so a run that was stopped and went on judges as one that never was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Row = Mapping[str, float]
STOP_AFTER = 3
"""Evaluations without a new best after which a run is told that it could stop."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """best: the step with the lowest validation loss; since: evaluations after it that were no better."""

    best: int
    loss: float
    since: int

    @property
    def words(self) -> str:
        """The verdict in a few words."""
        if self.since == 0:
            return "best so far"
        if self.since < STOP_AFTER:
            return f"best was step {self.best}"
        return f"best was step {self.best}, {self.since} evaluations ago: stop now"


def evaluated(rows: Sequence[Row]) -> dict[int, Row]:
    """Step -> what was measured at it, in one row each; the base is step 0."""
    merged: dict[int, dict[str, float]] = {}
    for row in rows:
        if "loss" not in row:
            merged.setdefault(int(row["step"]), {}).update(row)
    return {step: row for step, row in sorted(merged.items()) if "validation_loss" in row}


def verdict(rows: Sequence[Row]) -> Verdict | None:
    """What the evaluations so far say, the base's own left out; None before the first."""
    trained = {step: row["validation_loss"] for step, row in evaluated(rows).items() if step > 0}
    if not trained:
        return None
    best = min(trained, key=lambda step: (trained[step], step))
    return Verdict(best=best, loss=trained[best], since=sum(step > best for step in trained))


def ranked_table(rows: Sequence[Row], run: Path) -> str:
    """The evaluated steps, best first, as fixed columns; a step whose checkpoint is kept is marked with a star.

    low, mid and high are the validation loss by noise level; base style: the loss on what the base draws by itself, as
    a multiple of the base's own; nearest: how alike the preview's pictures are to their nearest training pictures.
    """
    measured = evaluated(rows)
    base = measured.get(0, {}).get("base_style_loss")
    order = sorted(measured, key=lambda step: (measured[step]["validation_loss"], step))
    lines = ["    step  validation    low    mid   high  base style  nearest"]
    for step in order:
        row = measured[step]
        kept = "*" if (run / "checkpoints" / f"step-{step:06d}").is_dir() else " "
        levels = "".join(_cell(value, 7) for value in bands(row))
        drift = row["base_style_loss"] / base if base and "base_style_loss" in row else None
        name = "base" if step == 0 else str(step)
        rest = _cell(drift, 12) + _cell(row.get("nearest"), 9)
        lines.append(f"  {kept} {name:>4}  {row['validation_loss']:>10.3f}{levels}{rest}")
    return "\n".join(lines)


def bands(row: Row) -> list[float | None]:
    """Mean validation loss at low, middle and high noise levels."""
    levels = {float(key.rpartition("_")[2]): loss for key, loss in row.items() if key.startswith("validation_loss_sig")}
    parts = [[loss for sigma, loss in levels.items() if low <= sigma < high] for low, high in _BANDS]
    return [sum(part) / len(part) if part else None for part in parts]


_BANDS = ((0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1.01))


def _cell(value: float | None, width: int) -> str:
    return f"{'-' if value is None else format(value, '.3f'):>{width}}"
