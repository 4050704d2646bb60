"""The README's picture of every mode: what the demo's adapter draws on the bundled model.

flux2-lora train
python scripts/draw_modes.py --run outputs/demo --output docs/modes.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw

from flux2_lora import Pipeline
from flux2_lora.bundled import share
from flux2_lora.inference.grid import Section, draw_grid

STYLE = "inkline style"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--output", type=Path, default=Path("docs/modes.png"))
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    pipeline = Pipeline.load(wanted.run, device="cpu")
    draw_grid("flux2-lora tiny, the demo's adapter", sections(pipeline, wanted.seed)).save(wanted.output)


def sections(pipeline: Pipeline, seed: int) -> list[Section]:
    """Text to image beside the base; then every way to change a picture that the adapter has not learned from."""
    prompts = [f"grinning face, {STYLE}", f"cat face, {STYLE}", f"red heart, {STYLE}", f"crescent moon, {STYLE}"]
    pipeline.use([0.0])
    base = pipeline.generate(prompts, seed=seed)
    pipeline.use([1.0])
    drawn = pipeline.generate(prompts, seed=seed)

    face = held_out("grinning-face")
    eyes = Image.new("L", face.size, 0)
    ImageDraw.Draw(eyes).rectangle((8, 16, 55, 34), fill=255)
    half = face.crop((0, 0, 32, 64))
    edits: dict[str, list[Image.Image | None]] = {
        "inpaint": [face, eyes, pipeline.inpaint(face, eyes, prompts[0], seed=seed)],
        "outpaint": [half, None, pipeline.outpaint(half, prompts[0], right=32, seed=seed)],
        "image to image": [base[1], None, pipeline.redraw(base[1], prompts[1], strength=0.4, seed=seed)],
        "upscale x 2": [drawn[0], None, pipeline.upscale(drawn[0], prompts[0], factor=2, strength=0.3, seed=seed)],
    }
    return [
        Section(columns=prompts, rows=[("base", base), ("adapter", drawn)]),
        Section(columns=["picture", "mask", "result"], rows=list(edits.items())),
    ]


def held_out(name: str) -> Image.Image:
    """A picture of the style that was kept from training, 64 px."""
    with Image.open(share() / "data/demo/validation" / f"{name}.png") as picture:
        return picture.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    main()
