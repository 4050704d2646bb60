"""Does a LoRA with default settings learn a demo style, and keep its subjects? Measured, beside a control.

    python scripts/pretrain_tiny.py data; python scripts/pretrain_tiny.py judge
    python scripts/prove_demo.py --seeds 0 1 2

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

from flux2_lora import Pipeline
from flux2_lora.bundled import share
from flux2_lora.miniature.bundle import TRIGGERS
from flux2_lora.miniature.icons import INK, POSTER, SETS, Drawings, load_labels, slug
from flux2_lora.miniature.judge import Judge, load_judge
from flux2_lora.miniature.subjects import COMMON

BASE_STYLE = SETS[0].style


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
    wanted = parser.parse_args()
    judge, data = load_judge(wanted.work), share() / "data"
    control = wanted.output / "control"
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
    print("| style | seed | loss / base | style seen, base -> adapter | subject named, base -> adapter |")
    print("|---|---|---|---|---|", flush=True)
    for case in cases:
        for seed in wanted.seeds:
            told = measured(case, trained(case, wanted.output, seed), judge)
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


def trained(case: Case, output: Path, seed: int) -> Path:
    """The folder of a run with default settings, without previews; a finished run is not made again."""
    name = f"{case.name}-{seed}"
    options = [f"dataset.folder={case.folder}", f"seed={seed}", f"name={name}", f"output_dir={output}"]
    if case.validation is not None:
        options.append(f"dataset.validation={case.validation}")
    command = [sys.executable, "-m", "flux2_lora", "train", *options, "preview.every=0", "device=cpu"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    return output / name


def measured(case: Case, run: Path, judge: Judge) -> Measured:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["validation_loss"] for row in rows if "validation_loss" in row]
    pipeline = Pipeline.load(run, device="cpu")
    prompts = [f"{name}, {case.trigger} style" for name in COMMON]
    adapted = pipeline.generate(prompts, seed=0)
    pipeline.use([0.0])
    base = pipeline.generate(prompts, seed=0)
    own = pipeline.generate([f"{name}, {BASE_STYLE} style" for name in COMMON], seed=0)
    return Measured(
        loss=losses[-1] / losses[0],
        look=(part(judge.looks(base), case.look), part(judge.looks(adapted), case.look)),
        subject=(named(judge.subjects(own)), named(judge.subjects(adapted))),
    )


def part(seen: Sequence[str], look: str) -> float:
    return sum(one == look for one in seen) / len(seen)


def named(seen: Sequence[str]) -> float:
    return sum(one == name for one, name in zip(seen, COMMON, strict=True)) / len(seen)


if __name__ == "__main__":
    main()
