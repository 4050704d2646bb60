"""A sweep at a glance: its runs by validation loss as a table, and their last previews beside each other.

Everything is read from the folders of the runs, so that it does not matter where and when they ran. What a run does not
have, its cells say.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml  # type: ignore[import-untyped]
from PIL import Image, ImageDraw, ImageFont

from flux2_lora.dataset import DatasetSpec, preview_prompts
from flux2_lora.files import write_text
from flux2_lora.inference.drawn import drawn_steps, picture_files, read_texts, step_folder
from flux2_lora.inference.grid import Section, draw_grid
from flux2_lora.training.progress import console
from flux2_lora.training.tracking import read_metrics

_MOST_COLUMNS, _CELL_PX = 6, 256


class Run(Protocol):
    """A run of a sweep: its folder, the options that tell it from the others, what it died of or None."""

    @property
    def name(self) -> str: ...
    @property
    def folder(self) -> Path: ...
    @property
    def options(self) -> Mapping[str, str]: ...
    @property
    def failure(self) -> str | None: ...


@dataclass(frozen=True, kw_only=True)
class Result:
    """What the files of a run say; None for what it has not measured. The base is no step: best is of later ones."""

    run: Run
    base: float | None
    last: float | None
    best: float | None
    best_step: int | None
    step_s: float | None


def compare(runs: Sequence[Run], folder: Path) -> None:
    """Write folder/comparison.md, and comparison.png where there are previews; print the table."""
    results = sorted(map(measured, runs), key=_rank)
    picture = folder / "comparison.png"
    picture.unlink(missing_ok=True)
    section = sheet(results)
    if section is not None:
        draw_grid(f"{folder.name}: {_heading(len(section.columns) - 1, len(runs))}", [section], _CELL_PX).save(picture)
    page = folder / "comparison.md"
    write_text(page, markdown(results, picture if section else None, folder.name))
    for row in _padded(_table(results)):
        console.print("  ".join(row).rstrip())
    console.print(f"table     {page}")
    console.print(f"pictures  {picture if section else 'no run has previews'}")


def measured(run: Run) -> Result:
    """The losses and the pace of a run."""
    rows = read_metrics(run.folder / "metrics.jsonl")
    losses = {int(row["step"]): row["validation_loss"] for row in rows if _is_loss(row.get("validation_loss"))}
    learned = {step: loss for step, loss in losses.items() if step > 0}
    best = min(learned, key=learned.__getitem__, default=None)
    paces = [row["step_s"] for row in rows if "step_s" in row]
    return Result(
        run=run,
        base=losses.get(0),
        last=learned[max(learned)] if learned else None,
        best=None if best is None else learned[best],
        best_step=best,
        step_s=statistics.median(paces) if paces else None,  # the first steps are slower: they compile or warm up
    )


def markdown(results: Sequence[Result], picture: Path | None, title: str) -> str:
    """The page of a sweep, readable without a viewer too."""
    header, *rows = _padded(_table(results, wide=True))
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["-" * len(cell) for cell in header], *rows)]
    notes = ["By the best validation loss after the base; runs that failed stand at the end."]
    bases = [result.base for result in results if result.base is not None]
    if bases and not math.isclose(min(bases), max(bases), rel_tol=1e-3):
        notes.append("The bases differ, as with other pictures held out: compare best / base rather than losses.")
    image = [f"![Last previews of the runs]({picture.name})", ""] if picture else []
    return "\n".join([f"# {title}", "", *notes, "", *lines, "", *image])


def sheet(results: Sequence[Result]) -> Section | None:
    """Prompts as rows; the base and the best runs as columns. None where no run has drawn a preview."""
    found = [(number, result.run, _last_preview(result.run)) for number, result in enumerate(results, start=1)]
    shown = [(number, run, place) for number, run, place in found if place is not None][:_MOST_COLUMNS]
    if not shown:
        return None
    bases = [step_folder(run.folder / "previews", 0) for _, run, _ in shown]
    places = [bases[0], *(place for *_, place in shown)]
    count = 1 + max(int(file.stem) for place in places for file in picture_files(place))
    texts = _texts(shown[0][1], count)
    rows = [(texts[row], [_opened(place / f"{row:04d}.png") for place in places]) for row in range(count)]
    same = len({tuple(file.read_bytes() for file in picture_files(base)) for base in bases}) == 1
    heads = [f"{number}: {_told(run)}" for number, run, _ in shown]
    return Section(columns=["base" if same else f"base of {shown[0][0]}", *heads], rows=rows)


def _rank(result: Result) -> tuple[bool, float]:
    return result.run.failure is not None, math.inf if result.best is None else result.best


def _is_loss(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _heading(shown: int, total: int) -> str:
    return f"{total} runs, best validation loss first" if shown == total else f"the best {shown} of {total} runs"


def _table(results: Sequence[Result], *, wide: bool = False) -> list[list[str]]:
    """Header and rows; wide: with a column for each swept option and for the folder."""
    swept = list(dict.fromkeys(key for result in results for key in result.run.options)) if wide else []
    header = ["#", "run", *swept, "base", "last", "best", "at step", "best / base", "s/step"]
    rows = [
        [str(number), result.run.name, *(result.run.options.get(key, "-") for key in swept), *_measures(result)]
        for number, result in enumerate(results, start=1)
    ]
    if wide:
        header.append("folder")
        rows = [[*row, str(result.run.folder)] for row, result in zip(rows, results, strict=True)]
    if any(result.run.failure for result in results):
        header.append("failed")
        rows = [[*row, result.run.failure or "-"] for row, result in zip(rows, results, strict=True)]
    return [[_cell(text) for text in row] for row in (header, *rows)]


def _measures(result: Result) -> list[str]:
    ratio = result.best / result.base if result.best is not None and result.base else None
    missing = "-" if result.run.failure else "not validated"
    return [
        _number(result.base, 4) if result.base is not None or result.best is not None else missing,
        _number(result.last, 4),
        _number(result.best, 4),
        "-" if result.best_step is None else str(result.best_step),
        _number(ratio, 3),
        _number(result.step_s, 2),
    ]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _padded(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]


def _told(run: Run) -> str:
    return ", ".join(f"{key}={value}" for key, value in run.options.items()) or run.name


def _last_preview(run: Run) -> Path | None:
    """The folder of the last preview that has pictures, the base's apart."""
    previews = run.folder / "previews"
    steps = [step for step in drawn_steps(previews) if step > 0]
    return step_folder(previews, steps[-1]) if steps else None


def _opened(file: Path) -> Image.Image:
    """A picture, or the word that there is none; a file cut short by a crash is none."""
    try:
        with Image.open(file) as picture:
            return picture.convert("RGB")
    except OSError:
        return _none()


def _none() -> Image.Image:
    paper = Image.new("RGB", (_CELL_PX, _CELL_PX), "#f2f2f2")
    ImageDraw.Draw(paper).text((_CELL_PX // 2,) * 2, "no preview", "#6b6b6b", ImageFont.load_default(14), anchor="mm")
    return paper


def _texts(run: Run, count: int) -> list[str]:
    """What the rows of previews show: as the run has said, else preview.prompts or the folder's prompts.txt."""
    said = read_texts(run.folder / "previews")
    given = said.prompts if said is not None else _asked_for(run)
    return [given[row] if row < len(given) else f"preview {row + 1}" for row in range(count)]


def _asked_for(run: Run) -> list[str]:
    """The prompts of a run that has not said what it drew, as far as they can be read."""
    page = run.folder / "run.yaml"
    options: dict[str, Any] = yaml.safe_load(page.read_text(encoding="utf-8")) if page.is_file() else {}
    dataset, given = options.get("dataset", {}), options.get("preview", {}).get("prompts", [])
    if given or not dataset.get("folder"):
        return list(given)
    return preview_prompts(DatasetSpec(**{key: dataset[key] for key in _WHERE if key in dataset}))


_WHERE = ("folder", "trigger_word", "follow_links")
