"""Train the bundled model with each optimizer and each schedule, and print what each learned as a table.

    python scripts/bench_optimizers.py --steps 60

All start from the same adapter and see the same pictures, noise and noise levels in the same order, each with the
options of its page in configs/optimizer. The state is what the optimizer's file of a checkpoint takes. Exit code 1 when
the validation loss of one does not fall.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch

from flux2_lora import cli

OPTIMIZERS = ("adamw", "adamw8bit", "prodigy", "schedule_free", "adafactor", "lion", "came")
SCHEDULES = ("linear", "cosine", "rex")
MORE = {
    "adamw, LoRA+": ["optimizer.b_lr_ratio=8", "optimizer.lr=0.0002"],
    "adamw, EMA 0.95": ["optimizer.ema_decay=0.95"],
    "adamw, rank-stabilised": ["adapter.rank_stabilised=true", "optimizer.lr=0.0002"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", default=None, help="a folder to keep the runs in")
    wanted = parser.parse_args()
    settings = {name: [f"optimizer={name}"] for name in OPTIMIZERS}
    settings |= {f"adamw, {schedule}": [f"optimizer.schedule={schedule}"] for schedule in SCHEDULES}
    settings |= MORE
    print(f"| optimizer, schedule | validation loss, base | after {wanted.steps} steps | x | state, MB | s a step |")
    print("|---|---|---|---|---|---|", flush=True)
    rising = 0
    with tempfile.TemporaryDirectory() as temporary:
        for number, (title, options) in enumerate(settings.items()):
            run = Path(wanted.output or temporary).resolve() / f"run{number}"
            base, last, state_bytes, step_s = trained(run, options, wanted.steps)
            rising += not last < base
            cells = (
                title,
                f"{base:.3f}",
                f"{last:.3f}",
                f"{last / base:.2f}",
                f"{state_bytes / 1e6:.1f}",
                f"{step_s:.2f}",
            )
            print(f"| {' | '.join(cells)} |", flush=True)
    sys.exit(1 if rising else 0)


def trained(run: Path, options: list[str], steps: int) -> tuple[float, float, int, float]:
    """Validation loss of the base and at the end, bytes of the optimizer's file, and the median step."""
    fixed = [
        f"max_steps={steps}",
        f"validation.every={steps}",
        "preview.every=0",
        "validation.base_style=0",
        "device=cpu",
    ]
    arguments = [*fixed, *options, f"output_dir={run.parent}", f"name={run.name}", "checks=false", "resume=never"]
    before, sys.stdout = sys.stdout, sys.stderr
    try:
        cli.main(["train", *arguments])
    finally:
        sys.stdout = before
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["validation_loss"] for row in rows if "validation_loss" in row]
    file = run / "checkpoints" / f"step-{steps:06d}" / "optimizer.safetensors"
    return losses[0], losses[-1], file.stat().st_size, median(row["step_s"] for row in rows if "step_s" in row)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
