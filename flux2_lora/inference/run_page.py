"""The report of a run: one HTML file with its pictures by step, its curves, its verdict and its settings.

Law: a pure function of what lies in the run's folder, and one file that needs no other: pictures are data: URIs, and a
policy in the page forbids every request. It may be passed on, so of paths only the last part is told. What the user
wrote is escaped, and what a run has not made is left out.
"""

from __future__ import annotations

import base64
import json
import math
import re
import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from PIL import Image

from flux2_lora.bundled import share
from flux2_lora.files import write_text
from flux2_lora.inference.curves import Line, Point, figure, smoothed
from flux2_lora.inference.drawn import (
    EDITS,
    Texts,
    drawn_steps,
    edit_files,
    picture_files,
    read_texts,
    spread,
    step_folder,
    thumbnail_files,
)
from flux2_lora.training.ranking import STOP_AFTER, Row, Verdict, bands, evaluated, verdict
from flux2_lora.training.tracking import read_metrics

_MOST_STEPS, _MOST_EVALUATIONS = 24, 40
# 20 Mpx of WebP are some 5 MB, and a third more in base64.
_BUDGET_PX, _LARGEST_PX, _SMALLEST_PX = 20_000_000, 512, 192
_THUMBNAIL_PX, _PIXELS_BELOW_PX = 128, 200


def write_report(run: Path) -> Path:
    """Write report.html into the run's folder; returns its path."""
    page = run / "report.html"
    write_text(page, _page(_read(run)))
    return page


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What the folder holds. steps: those whose previews are shown, some of them where there are many."""

    folder: Path
    name: str
    options: Mapping[str, Any]
    rows: Sequence[Row]
    steps: Sequence[int]
    texts: Texts | None

    @property
    def previews(self) -> Path:
        return self.folder / "previews"

    @property
    def last(self) -> int:
        """The last step that was trained or looked at."""
        return max((int(row["step"]) for row in self.rows), default=0)

    @property
    def losses(self) -> dict[int, Row]:
        """Step -> its evaluation, where the loss is a number."""
        return {step: row for step, row in evaluated(self.rows).items() if row["validation_loss"] is not None}

    @property
    def verdict(self) -> Verdict | None:
        return verdict([row for row in self.rows if row.get("validation_loss", 0) is not None])


def _read(run: Path) -> _Run:
    page, rows = run / "run.yaml", read_metrics(run / "metrics.jsonl")
    options = yaml.safe_load(page.read_text(encoding="utf-8")) if page.is_file() else {}
    last = max((row["step"] for row in rows), default=math.inf)  # later previews are of a run that was replaced
    return _Run(
        folder=run,
        name=run.resolve().name,
        options=options or {},
        rows=rows,
        steps=spread([step for step in drawn_steps(run / "previews") if step <= last], _MOST_STEPS),
        texts=read_texts(run / "previews"),
    )


def _page(run: _Run) -> str:
    here = Path(__file__)
    style, script = (here.with_suffix(kind).read_text(encoding="utf-8") for kind in (".css", ".js"))
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    parts = [_head(run), _pictures(run), _curves(run), _evaluations(run), _files(run), _settings(run)]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(run.name)}: training report</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, parts))
        + f"\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _head(run: _Run) -> str:
    facts = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in _facts(run))
    return f'<header><h1>{escape(run.name)}</h1><dl class="facts">{facts}</dl>{_verdict(run)}</header>'


def _facts(run: _Run) -> Iterator[tuple[str, str]]:
    """What one wants to know first, as far as it was written down."""
    names = {
        "base": "model.title",
        "rank": "adapter.rank",
        "learning rate": "optimizer.lr",
        "batch": "batch_size",
        "resolution": "dataset.resolution",
        "trigger": "dataset.trigger_word",
    }
    options = dict(_flat(run.options))
    most = options.get("max_steps", "")
    yield "steps", f"{run.last} of {most}" if most else str(run.last)
    for name, option in names.items():
        if options.get(option, "null") != "null":
            yield name, options[option]
    paces = [row["step_s"] for row in run.rows if row.get("step_s") is not None]
    if paces:
        yield "pace", f"{statistics.median(paces):.2f} s a step"


def _verdict(run: _Run) -> str:
    found, losses = run.verdict, run.losses
    if found is None:
        return (
            '<p class="verdict open"><strong>No verdict</strong><br>No held-out pictures were looked at '
            "(validation.every, dataset.holdout): judge by the pictures.</p>"
        )
    said = f"validation loss {found.loss:.3f}"
    base = losses[0]["validation_loss"] if 0 in losses else None
    if base:
        said += f", the base has {base:.3f} ({found.loss / base:.2f} times as much)"
    if base and found.loss >= base:
        title, advice = "No step is better than the base", "try a lower optimizer.lr, or look at the captions"
    elif found.since == 0:
        title, advice = f"Step {found.best} is best", "it was still getting better: more steps may help"
    elif found.since < STOP_AFTER:
        title, advice = f"Step {found.best} is best", "no better since"
    else:
        title, advice = f"Step {found.best} is best: stop now", f"{found.since} evaluations since were no better"
    kind = "verdict open" if base and found.loss >= base else "verdict"
    return f'<p class="{kind}"><strong>{title}</strong><br>{said}; {advice}.</p>'


def _pictures(run: _Run) -> str:
    """The slider, a card a prompt with the base beside the step, the edits, and what was learned from."""
    learned = _training(run)
    if not run.steps:
        none = '<h2>Pictures</h2><p class="pale">This run drew no previews (preview.every=0).</p>'
        return f"<section>{none}{learned}</section>"
    count = 1 + max(int(file.stem) for step in run.steps for file in picture_files(step_folder(run.previews, step)))
    edits = [name for name in EDITS if all(file.is_file() for file in edit_files(run.previews, name))]
    side = _side_px(len(run.steps) * (count + len(edits)))
    rows = "".join(_prompt_row(run, row, side) for row in range(count))
    edited = "".join(_edit_row(run, name, side) for name in edits)
    if edited:
        edited = f'<h3 class="part">Repainting a picture</h3><div class="rows">{edited}</div>'
    kind = "look beside" if learned else "look"
    return (
        f"<section><h2>Pictures by step</h2>{_slider(run)}"
        f'<div class="{kind}"><div><div class="rows">{rows}</div>{edited}</div>{learned}</div></section>'
    )


def _slider(run: _Run) -> str:
    if len(run.steps) < 2:
        return ""
    steps = escape(json.dumps([(step, _called(run, step)) for step in run.steps]))
    last = len(run.steps) - 1
    words = _called(run, run.steps[-1])
    return (
        f'<div class="bar"><label for="at">Step</label><input id="at" type="range" min="0" max="{last}" step="1" '
        f'value="{last}" data-steps="{steps}" aria-valuetext="{words}"><output class="words" for="at">{words}</output>'
        "</div><noscript><p>The slider needs JavaScript; the last step is shown.</p></noscript>"
    )


def _called(run: _Run, step: int) -> str:
    found = run.verdict
    best = " (best)" if found is not None and found.best == step else ""
    return "base" if step == 0 else f"step {step}{best}"


def _prompt_row(run: _Run, row: int, side: int) -> str:
    prompts = run.texts.prompts if run.texts else []
    text = prompts[row] if row < len(prompts) else f"preview {row + 1}"
    base = ""
    if run.steps[0] == 0 and len(run.steps) > 1:
        picture = _image(_at(run, 0, f"{row:04d}"), side, f"the base: {text}")
        base = f"<figure>{picture or _NONE}<figcaption>base</figcaption></figure>"
    return (
        f'<article class="row"><h3>{escape(text)}</h3><div class="side">{base}'
        f"{_by_step(run, f'{row:04d}', side, text)}</div></article>"
    )


def _edit_row(run: _Run, name: str, side: int) -> str:
    texts = run.texts
    text = f"{name}: {texts.edited}" if texts else name
    picture, mask = edit_files(run.previews, name)
    part = 100 * _width(picture) / _width(mask)
    before = _image(picture, side, f"{name}, the picture", f'style="width: {part:.1f}%"') or _NONE
    hole = _image(mask, side, f"{name}, the mask: white is painted") or _NONE
    return (
        f'<article class="row"><h3>{escape(text)}</h3><div class="side">'
        f"<figure>{before}<figcaption>picture</figcaption></figure>"
        f"<figure>{hole}<figcaption>white is painted</figcaption></figure>"
        f"{_by_step(run, name, side, text)}</div></article>"
    )


def _width(file: Path) -> int:
    """Of a picture; 1 where there is none."""
    try:
        with Image.open(file) as opened:
            return opened.width
    except OSError:
        return 1


def _by_step(run: _Run, stem: str, side: int, text: str) -> str:
    """The picture of every step, of which one is shown."""
    images = []
    for place, step in enumerate(run.steps):
        shown = f'data-at="{place}"' + ("" if step == run.steps[-1] else " hidden")
        image = _image(_at(run, step, stem), side, f"{_called(run, step)}: {text}", shown)
        images.append(image or f'<p class="none" {shown}>no picture</p>')
    return f'<figure>{"".join(images)}<figcaption class="words">{_called(run, run.steps[-1])}</figcaption></figure>'


def _at(run: _Run, step: int, stem: str) -> Path:
    return step_folder(run.previews, step) / f"{stem}.png"


def _training(run: _Run) -> str:
    images = (_image(file, _THUMBNAIL_PX, "a training picture") for file in thumbnail_files(run.previews))
    items = "".join(f"<li>{image}</li>" for image in images if image)
    return f'<aside><h3 class="part">Learned from</h3><ul class="strip">{items}</ul></aside>' if items else ""


_NONE = '<p class="none">no picture</p>'


def _image(file: Path, side_px: int, alt: str, attributes: str = "") -> str | None:
    """An <img> that holds its picture; None for a file that is absent or cut short by a crash."""
    try:
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
    except OSError:
        return None
    small = max(picture.size) < _PIXELS_BELOW_PX
    picture.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    raw = BytesIO()
    picture.save(raw, "WEBP", quality=75, lossless=small)
    uri = f"data:image/webp;base64,{base64.b64encode(raw.getvalue()).decode()}"
    kind = ' class="pixels"' if small else ""
    size = f'width="{picture.width}" height="{picture.height}"'
    return f'<img{kind} {size} alt="{escape(alt)}" {attributes} src="{uri}">'


def _side_px(pictures: int) -> int:
    """The longest side at which that many pictures stay within the budget."""
    return max(min(_LARGEST_PX, math.isqrt(_BUDGET_PX // max(pictures, 1))), _SMALLEST_PX)


def _curves(run: _Run) -> str:
    losses, found = run.losses, run.verdict
    raw = _points(run.rows, "loss")
    validation = [(step, row["validation_loss"]) for step, row in losses.items()]
    by_noise = [
        Line(
            name=name,
            points=[(step, level) for step, row in losses.items() if (level := bands(row)[place]) is not None],
        )
        for place, name in enumerate(("low", "middle", "high"))
    ]
    own = _points(run.rows, "base_style_loss")
    drift = [(step, loss / own[0][1]) for step, loss in own] if own and own[0][0] == 0 and own[0][1] else []
    nearest = _points(run.rows, "nearest")
    mark = (found.best, found.loss) if found is not None else None
    charts = [
        figure(
            "Validation loss",
            "On pictures that were held out, at fixed noise. Lower is better; this decides.",
            [Line(name="validation", points=validation)],
            mark,
            f"best: step {found.best}" if found is not None else "",
        ),
        figure(
            "Training loss",
            "Jumps with the noise level of each step and hardly falls in a flow model; it does not decide.",
            [Line(name="each step", points=raw, faint=True), Line(name="smoothed", points=smoothed(raw))],
        ),
        figure("Validation by noise level", "Low noise is texture and line, high noise is composition.", by_noise),
        figure(
            "Base style",
            "Loss on what the base draws by itself, as a multiple of its own: above 1, so much is forgotten.",
            [Line(name="base style", points=drift)],
        ),
        figure(
            "Nearest training picture",
            "How alike the previews are to it, 1 being the same. Close to 1 means that pictures are copied.",
            [Line(name="nearest", points=nearest)],
        ),
    ]
    drawn = "".join(charts)
    return f'<section><h2>Curves</h2><div class="charts">{drawn}</div></section>' if drawn else ""


def _points(rows: Sequence[Row], key: str) -> list[Point]:
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def _evaluations(run: _Run) -> str:
    """The evaluated steps as a table, for those who want the numbers."""
    losses, found = run.losses, run.verdict
    if not losses:
        return ""
    base = losses.get(0, {}).get("base_style_loss")
    heads = ("step", "loss", "low", "middle", "high", "base style", "nearest", "kept")
    lines = ["<tr>" + "".join(f'<th scope="col">{head}</th>' for head in heads) + "</tr>"]
    for step in spread(list(losses), _MOST_EVALUATIONS):
        row = losses[step]
        drift = row["base_style_loss"] / base if base and row.get("base_style_loss") is not None else None
        values = (row["validation_loss"], *bands(row), drift, row.get("nearest"))
        cells = "".join(f"<td>{'-' if value is None else format(value, '.3f')}</td>" for value in values)
        kept = "yes" if (run.folder / "checkpoints" / f"step-{step:06d}").is_dir() else "-"
        best = ' class="best"' if found is not None and found.best == step else ""
        lines.append(f"<tr{best}><td>{'base' if step == 0 else step}</td>{cells}<td>{kept}</td></tr>")
    table = f'<table class="numbers">{"".join(lines)}</table>'
    scroll = f'<div class="scroll" tabindex="0" role="region" aria-label="Validation by step">{table}</div>'
    note = '<p class="pale">The best step is bold; "kept" are those whose checkpoint is still there.</p>'
    return f'<section><h2>Validation by step</h2><div class="card">{scroll}{note}</div></section>'


def _files(run: _Run) -> str:
    """Checkpoints, exports, and how to draw with them."""
    found = run.verdict
    best = f"step-{found.best:06d}" if found is not None else ""
    rows = [
        (f"checkpoints/{folder.name}", "the best checkpoint" if folder.name == best else "a checkpoint")
        for folder in sorted((run.folder / "checkpoints").glob("step-*"))
    ]
    rows += [
        (f"export/{file.name}", f"{file.stat().st_size / 1e6:.1f} MB, for ComfyUI, Forge and Diffusers")
        for file in sorted((run.folder / "export").glob("*.safetensors"))
    ]
    if not rows:
        return ""
    items = "".join(f"<tr><td><code>{escape(name)}</code></td><td>{said}</td></tr>" for name, said in rows)
    return (
        f'<section><h2>Files</h2><div class="card"><table class="files">{items}</table>'
        f"<p>Draw with the adapter:</p><pre>{escape(_command(run))}</pre></div></section>"
    )


def _command(run: _Run) -> str:
    """Sampling with the run, from the folder that holds the outputs."""
    texts, outputs = run.texts, _shown(str(run.options.get("output_dir", "outputs")))
    prompt = texts.prompts[0] if texts and texts.prompts else "a prompt"
    quoted = prompt.replace("\\", "\\\\").replace('"', '\\"')
    return shlex.join(
        ["flux2-lora", "sample", *_model(run), f"adapters=[{outputs}/{run.name}]", f'prompts=["{quoted}"]']
    )


def _model(run: _Run) -> list[str]:
    """The options that name the run's model: its page in configs/model, and a path of one's own."""
    model = run.options.get("model", {})
    for page in sorted((share() / "configs" / "model").glob("*.yaml")):
        known = yaml.safe_load(page.read_text(encoding="utf-8"))
        if (known.get("title"), known.get("family")) == (model.get("title"), model.get("family")):
            bundled = str(known.get("path")).startswith("${")
            path = [] if bundled or known.get("path") == model.get("path") else [f"model.path={_shown(model['path'])}"]
            return [f"model={page.stem}", *path]
    return ["model=..."]


def _settings(run: _Run) -> str:
    if not run.options:
        return ""
    rows = "".join(
        f"<tr><td><code>{_breakable(name)}</code></td><td>{escape(value)}</td></tr>"
        for name, value in _flat(run.options)
    )
    table = f"<table>{rows}</table>"
    summary = "<summary>All options of run.yaml; of paths the last part</summary>"
    return f'<section><h2>Settings</h2><details class="card">{summary}{table}</details></section>'


def _breakable(name: str) -> str:
    """A dotted option that a narrow screen breaks after a dot or an underscore."""
    return re.sub(r"([._])", r"\1<wbr>", escape(name))


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Dotted options and their values as the command line takes them."""
    if isinstance(value, Mapping) and value:
        for key, part in value.items():
            yield from _flat(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(part, Mapping | list) for part in value):
        for place, part in enumerate(value):
            yield from _flat(part, f"{name}.{place}")
    elif isinstance(value, list):
        yield name, ", ".join(map(_said, value)) or "[]"
    else:
        yield name, _said(value)


def _said(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return _shown(value) if isinstance(value, str) else str(value)


def _shown(text: str) -> str:
    """Of a path that leads through somebody's folders, its last part."""
    if re.match(r"[/~]|\.\.[\\/]|[A-Za-z]:[\\/]|\\\\|file:", text):
        return re.split(r"[\\/]+", text.rstrip("\\/"))[-1] or text
    return text
