"""Does a LoRA with default settings learn a demo style, and keep its subjects? Measured, beside a control.

    python scripts/pretrain_tiny.py data; python scripts/pretrain_tiny.py judge
    python scripts/prove_demo.py --seeds 0 1 2
    python scripts/prove_demo.py optimizer.lr=1e-3 --cases ink     with other settings than the default ones

Trains on each demo style, and on the control: the same subjects in a style that the base knows, captions shuffled. What
is told of each run: the validation loss on held-out pictures of the demo style over the base's; how many samples of
subjects that were not trained a judge sees in that style; and how many it names rightly, beside the base's own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from flux2_lora import Pipeline
from flux2_lora.bundled import share
from flux2_lora.miniature.bundle import TRIGGERS
from flux2_lora.miniature.icons import INK, POSTER, SETS, Drawings, load_labels, slug
from flux2_lora.miniature.judge import Judge, load_judge
from flux2_lora.miniature.subjects import COMMON

BASE_STYLE = SETS[0].style
CASES = ("ink", "poster", "control")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A folder to train on, the trigger word of its captions, and the style that the judge should see."""

    name: str
    folder: Path
    trigger: str
    look: str
    validation: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of a run: its loss over the base's; parts of samples in the style, and of those named, base and adapter."""

    loss: float
    look: tuple[float, float]
    subject: tuple[float, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("outputs/pretrain_tiny"), help="where the judge is")
    parser.add_argument("--output", type=Path, default=Path("outputs/prove_demo"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("options", nargs="*", help="of flux2-lora train")
    wanted = parser.parse_intermixed_args()
    judge, data = load_judge(wanted.work), share() / "data"
    control = wanted.output / "control"
    if not control.is_dir():
        write_control(wanted.work, data / "demo", control)
    cases = [
        Case(name="ink", folder=data / "demo", trigger=TRIGGERS[INK], look=INK.style),
        Case(name="poster", folder=data / "demo_poster", trigger=TRIGGERS[POSTER], look=POSTER.style),
        Case(
            name="control",
            folder=control,
            trigger=TRIGGERS[INK],
            look=INK.style,
            validation=data / "demo/validation",
        ),
    ]
    base = Base()
    print("| style | seed | loss / base | style seen, base -> adapter | subject named, base -> adapter |")
    print("|---|---|---|---|---|", flush=True)
    for case in (case for case in cases if case.name in wanted.cases):
        for seed in wanted.seeds:
            options = [f"seed={seed}", f"device={wanted.device}", *wanted.options]
            run = trained(case, f"{case.name}-{seed}", wanted.output, options)
            told = measured(case, run, judge, base, wanted.device)
            look, subject = (f"{before:.2f} -> {after:.2f}" for before, after in (told.look, told.subject))
            print(f"| {case.name} | {seed} | {told.loss:.3f} | {look} | {subject} |", flush=True)


def write_control(work: Path, demo: Path, destination: Path) -> None:
    """The demo's training subjects drawn in a base style, each with the caption of another."""
    destination.mkdir(parents=True, exist_ok=True)
    drawings, labels = Drawings(work, SETS[0]), {slug(label.name): label for label in load_labels(work)}
    names = sorted(file.stem for file in demo.glob("*.png"))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    for name, other in zip(names, (names[i] for i in order), strict=True):
        picture = drawings.drawn(labels[name], 128)
        if picture is not None:
            picture.save(destination / f"{name}.png")
            (destination / f"{name}.txt").write_text((demo / f"{other}.txt").read_text())


def trained(case: Case, name: str, output: Path, options: Sequence[str]) -> Path:
    """The folder of a run with default settings but for these, without previews; what is there is not made again."""
    where = [f"dataset.folder={case.folder}", f"name={name}", f"output_dir={output}", "preview.every=0"]
    if case.validation is not None:
        where.append(f"dataset.validation={case.validation}")
    command = [sys.executable, "-m", "flux2_lora", "train", *where, *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    return output / name


class Base:
    """What the base draws without an adapter: each list of prompts once, since it is the same in every run."""

    def __init__(self) -> None:
        self.drawn: dict[tuple[str, ...], list[Image.Image]] = {}

    def draws(self, pipeline: Pipeline, prompts: Sequence[str]) -> list[Image.Image]:
        if tuple(prompts) not in self.drawn:
            pipeline.use([0.0])
            self.drawn[tuple(prompts)] = pipeline.generate(prompts, seed=0)
        return self.drawn[tuple(prompts)]


def measured(case: Case, run: Path, judge: Judge, base: Base, device: str) -> Measured:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["validation_loss"] for row in rows if "validation_loss" in row]
    pipeline = Pipeline.load(run, device=device)
    prompts = [f"{name}, {case.trigger} style" for name in COMMON]
    adapted = pipeline.generate(prompts, seed=0)
    before = base.draws(pipeline, prompts)
    own = base.draws(pipeline, [f"{name}, {BASE_STYLE} style" for name in COMMON])
    return Measured(
        loss=losses[-1] / losses[0],
        look=(part(judge.looks(before), case.look), part(judge.looks(adapted), case.look)),
        subject=(named(judge.subjects(own)), named(judge.subjects(adapted))),
    )


def part(seen: Sequence[str], look: str) -> float:
    return sum(one == look for one in seen) / len(seen)


def named(seen: Sequence[str]) -> float:
    return sum(one == name for one, name in zip(seen, COMMON, strict=True)) / len(seen)


if __name__ == "__main__":
    main()
