"""What the miniature draws, to be looked at and to be counted: sheets, and the verdict of the judge."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from flux2_lora.families import ModelSpec, open_model
from flux2_lora.inference.curves import Line, drawing
from flux2_lora.inference.grid import Section, draw_grid
from flux2_lora.inference.pipeline import Pipeline
from flux2_lora.miniature.examples import held_out, texts_of
from flux2_lora.miniature.icons import SIDE_PX, STYLES, Row, load_pictures
from flux2_lora.miniature.judge import Judge, load_judge
from flux2_lora.miniature.subjects import COMMON, SUBJECTS
from flux2_lora.miniature.variants import HELD_OUT
from flux2_lora.quantize import PrecisionSpec

AT_ONCE = 16
COLUMNS = 8


def open_miniature(folder: Path) -> Pipeline:
    """The model of a folder in float32, sampled as it is meant to be: 20 steps with a CFG scale of 3."""
    spec = ModelSpec(
        family="flux2_small",
        path=str(folder),
        title="tiny",
        architecture_name="Flux.2-small",
        resolution=SIDE_PX,
        steps=20,
        cfg_scale=3.0,
    )
    return Pipeline.open(open_model(spec), PrecisionSpec(base="fp32"), {}, torch.device("cpu"))


def drawn(pipeline: Pipeline, prompts: Sequence[str], *, seed: int) -> list[Image.Image]:
    """A picture a prompt, all of one seed."""
    parts = [prompts[i : i + AT_ONCE] for i in range(0, len(prompts), AT_ONCE)]
    return [picture for part in parts for picture in pipeline.generate(part, seed=seed)]


def show(work: Path, folder: Path, docs: Path, seed: int = 0) -> None:
    """Draw both sheets into docs/, and print how many subjects and styles the judge names rightly."""
    pipeline = open_miniature(folder)
    score(pipeline, load_judge(work), seed)
    subjects = [*COMMON[:48]]
    styled = [f"{name}, {STYLES[i % len(STYLES)]} style" for i, name in enumerate(subjects)]
    sheet("48 subjects that it was trained on", styled, drawn(pipeline, styled, seed=seed)).save(docs / "tiny.png")
    (docs / "tiny_curves.svg").write_text(curves(work))
    new = compositions(work)
    sheet("24 compositions that it was never trained on", new, drawn(pipeline, new, seed=seed)).save(
        docs / "tiny_compositions.png"
    )


def curves(work: Path) -> str:
    """How the transformer's loss and the VAE's PSNR went in training, as an SVG file."""
    charts = []
    for title, name in {"Transformer: flow-matching loss": "prior", "VAE: PSNR of unseen pictures, dB": "vae"}.items():
        rows = [json.loads(row) for row in (work / f"{name}.jsonl").read_text().splitlines()]
        names = [key for key in rows[0] if key != "step" and (name, key) != ("vae", "loss")]
        charts.append((title, [Line(name=key, points=[(row["step"], row[key]) for row in rows]) for key in names]))
    return drawing(charts)


def compositions(work: Path) -> list[str]:
    """12 common subjects in pairs of place and ink, 12 pairs of subject and style; none of these was ever trained."""
    _, every = load_pictures(work)
    rows = [row for row in every if row.style in STYLES and row.label in SUBJECTS]
    both = [f"{name}, {STYLES[i % 3]} style{''.join(HELD_OUT[i // 4])}" for i, name in enumerate(COMMON[::4][:12])]
    pairs = [texts_of(row)[0] for row, held in zip(rows, held_out(rows).tolist(), strict=True) if held]
    return both + pairs[:: max(1, len(pairs) // 12)][:12]


def score(pipeline: Pipeline, judge: Judge, seed: int) -> None:
    """Draw every common subject in every style; print the part whose subject and style is named."""
    wanted = [Row(label=name, style=style) for style in STYLES for name in COMMON]
    pictures = drawn(pipeline, [texts_of(row)[0] for row in wanted], seed=seed)
    subjects, looks = judge.subjects(pictures), judge.looks(pictures)
    for style in STYLES:
        of = [i for i, row in enumerate(wanted) if row.style == style]
        named = sum(subjects[i] == wanted[i].label for i in of) / len(of)
        styled = sum(looks[i] == style for i in of) / len(of)
        print(f"{style}: subject named {named:.2f}, style named {styled:.2f} of {len(of)}")
    named = sum(seen == row.label for seen, row in zip(subjects, wanted, strict=True)) / len(wanted)
    styled = sum(seen == row.style for seen, row in zip(looks, wanted, strict=True)) / len(wanted)
    print(f"all: subject named {named:.3f}, style named {styled:.3f} of {len(wanted)}")


def sheet(title: str, prompts: Sequence[str], pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures under their prompts, eight a row."""
    starts = range(0, len(prompts), COLUMNS)
    rows = [Section(columns=prompts[i : i + COLUMNS], rows=[("", pictures[i : i + COLUMNS])]) for i in starts]
    return draw_grid(title, rows)
