"""What a demo's adapter draws on the bundled model: every mode once, or inpainting and outpainting of many pictures.

flux2-lora train
python scripts/draw_modes.py --run outputs/demo --output docs/modes.png
python scripts/draw_modes.py --run outputs/demo --fills --output docs/fills.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from flux2_lora import Filling, Pipeline
from flux2_lora.bundled import share
from flux2_lora.inference.grid import Section, draw_grid
from flux2_lora.miniature.icons import slug

FILLING = Filling(resample=10, reconstruction=True)
MODES = ("grinning face", "cat face", "red heart", "crescent moon")
FILLED = ("grinning face", "cat face", "red heart", "angry face", "panda", "red apple", "star", "ghost")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--output", type=Path, default=Path("docs/modes.png"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dataset", type=Path, default=share() / "data/demo", help="what the run was trained on")
    parser.add_argument("--fills", action="store_true", help="only inpainting and outpainting")
    parser.add_argument(
        "--cfg-scale", type=float, default=1.0, help="of what is filled: how hard the prompt is pressed"
    )
    wanted = parser.parse_args()
    pipeline, demo = Pipeline.load(wanted.run, device="cpu"), Demo(wanted.dataset)
    drawn = fills if wanted.fills else modes
    filling = {"fill": FILLING, "cfg_scale": wanted.cfg_scale, "seed": wanted.seed}
    draw_grid("flux2-lora tiny, the demo's adapter", drawn(pipeline, demo, filling)).save(wanted.output)


class Demo:
    """Pictures of a style that were kept from training, 128 px, and their captions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "validation"

    def picture(self, subject: str) -> Image.Image:
        with Image.open(self.folder / f"{slug(subject)}.png") as picture:
            return picture.convert("RGB")

    def prompt(self, subject: str) -> str:
        return (self.folder / f"{slug(subject)}.txt").read_text().strip()


def fills(pipeline: Pipeline, demo: Demo, filling: dict[str, Any]) -> list[Section]:
    """The middle of each picture painted anew, and its right half."""
    pictures = [demo.picture(subject) for subject in FILLED]
    prompts = [demo.prompt(subject) for subject in FILLED]
    middle = Image.new("L", pictures[0].size, 0)
    ImageDraw.Draw(middle).rectangle((32, 32, 95, 95), fill=255)
    grey = Image.new("RGB", pictures[0].size, "#bbbbbb")
    holes = [Image.composite(grey, picture, middle) for picture in pictures]
    halves = [picture.crop((0, 0, 64, 128)) for picture in pictures]
    pairs = list(zip(pictures, halves, prompts, strict=True))
    inpainted = [pipeline.inpaint(picture, middle, prompt, **filling) for picture, _, prompt in pairs]
    outpainted = [pipeline.outpaint(half, prompt, right=64, **filling) for _, half, prompt in pairs]
    rows = {"picture": pictures, "hole": holes, "inpaint": inpainted, "half": halves, "outpaint": outpainted}
    return [Section(columns=prompts, rows=list(rows.items()))]


def modes(pipeline: Pipeline, demo: Demo, filling: dict[str, Any]) -> list[Section]:
    """Text to image beside the base; then every way to change a picture that the adapter has not learned from."""
    prompts, seed = [demo.prompt(subject) for subject in MODES], filling["seed"]
    pipeline.use([0.0])
    base = pipeline.generate(prompts, seed=seed)
    pipeline.use([1.0])
    drawn = pipeline.generate(prompts, seed=seed)

    face = demo.picture("grinning face")
    eyes = Image.new("L", face.size, 0)
    ImageDraw.Draw(eyes).rectangle((16, 32, 111, 69), fill=255)
    half = face.crop((0, 0, 64, 128))
    edits: dict[str, list[Image.Image | None]] = {
        "inpaint": [face, eyes, pipeline.inpaint(face, eyes, prompts[0], **filling)],
        "outpaint": [half, None, pipeline.outpaint(half, prompts[0], right=64, **filling)],
        "image to image": [base[1], None, pipeline.redraw(base[1], prompts[1], strength=0.4, seed=seed)],
        "upscale x 2": [drawn[0], None, pipeline.upscale(drawn[0], prompts[0], factor=2, strength=0.3, seed=seed)],
    }
    return [
        Section(columns=prompts, rows=[("base", base), ("adapter", drawn)]),
        Section(columns=["picture", "mask", "result"], rows=list(edits.items())),
    ]


if __name__ == "__main__":
    main()
