"""How the bundled `tiny` model is made: pictures -> VAE -> T5 and transformer -> a Diffusers folder -> a verdict.

    python scripts/pretrain_tiny.py data           install the sets of drawings, rasterise them
    python scripts/pretrain_tiny.py vae            AutoencoderKLFlux2 on every drawing, with line-art augmentation
    python scripts/pretrain_tiny.py transformer    Flux2Transformer2DModel and T5 together, on cached latents
    python scripts/pretrain_tiny.py bundle         write data/tiny, data/demo and data/demo_poster
    python scripts/pretrain_tiny.py judge          networks that name subject and style, from real pictures
    python scripts/pretrain_tiny.py show           sheets of samples into docs/, and what the judge names

A stage works for --minutes, keeps a checkpoint in --work, and goes on from it when it is called again; a stage that is
complete says so at once. --start goes on from the parts of a model instead of random weights. The transformer learns
from all drawings first, then with --start and --focused from those of its subjects. --steps and --batch are a CPU's
unless they are given; a GPU takes batches of 64 to 256.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from flux2_lora.devices import pick_device
from flux2_lora.miniature.bundle import write_demos, write_model
from flux2_lora.miniature.icons import install, rasterise
from flux2_lora.miniature.judge import train_judge
from flux2_lora.miniature.prior import train_prior
from flux2_lora.miniature.sheets import show
from flux2_lora.miniature.vae import train_vae

HERE = Path(__file__).resolve().parent.parent
GO_ON = "call it again to go on"
STAGES = ("data", "vae", "transformer", "bundle", "judge", "show")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--work", type=Path, default=Path("outputs/pretrain_tiny"))
    parser.add_argument("--start", type=Path, help="a Diffusers folder whose VAE or transformer is trained further")
    parser.add_argument("--steps", type=int, help="of the VAE or the transformer, in all")
    parser.add_argument("--batch", type=int, help="pictures a step")
    parser.add_argument("--focused", action="store_true", help="transformer: on its subjects alone, mostly as drawn")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--destination", type=Path, default=HERE / "data", help="where bundle writes tiny and the demos"
    )
    parser.add_argument("--docs", type=Path, default=HERE / "docs")
    wanted = parser.parse_args()
    run_stage(wanted)


def run_stage(wanted: argparse.Namespace) -> None:
    work, start, device = wanted.work, wanted.start, pick_device(wanted.device)
    torch.set_float32_matmul_precision("high")
    work.mkdir(parents=True, exist_ok=True)
    if wanted.stage == "data":
        install(work)
        rasterise(work)
    elif wanted.stage == "vae":
        steps, batch = wanted.steps or 4000, wanted.batch or 16
        begin = start / "vae" if start else None
        complete = train_vae(work, begin, device, steps=steps, batch=batch, minutes=wanted.minutes)
        print("complete" if complete else GO_ON)
    elif wanted.stage == "transformer":
        steps, batch = wanted.steps or 12000, wanted.batch or 32
        size = {"steps": steps, "batch": batch, "focused": wanted.focused}
        complete = train_prior(work, start, device, **size, minutes=wanted.minutes)
        print("complete" if complete else GO_ON)
    elif wanted.stage == "bundle":
        write_model(work, wanted.destination / "tiny")
        write_demos(work, wanted.destination)
    elif wanted.stage == "judge":
        train_judge(work)
    else:
        show(work, wanted.destination / "tiny", wanted.docs)


if __name__ == "__main__":
    main()
