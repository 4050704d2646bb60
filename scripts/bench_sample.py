"""Pictures a second against Diffusers' own pipeline on the same weights, and how long the first picture takes.

    python scripts/bench_sample.py
    python scripts/bench_sample.py --model KLEIN_FOLDER --family flux2_klein --height 256 --width 256

Both draw the same pictures, which is checked, with classifier-free guidance, in one process and in turns; the ratio is
the median over the turns. `cold` is the program from its start to its first picture, with the imports.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch

from flux2_lora.bundled import share
from flux2_lora.families import ModelSpec, open_model
from flux2_lora.inference.pipeline import Pipeline
from flux2_lora.quantize import PrecisionSpec

PROMPT, SCALE = "a red apple", 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(share() / "data/tiny"), help="a Diffusers folder of klein or of tiny")
    parser.add_argument("--family", default="flux2_small", choices=["flux2_small", "flux2_klein"])
    parser.add_argument("--height", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--turns", type=int, default=10)
    wanted = parser.parse_args()

    first = cold()
    ours, theirs = pictures(wanted)
    assert np.abs(ours().astype(float) - theirs()).max() <= 2, "the two draw different pictures"
    seconds = [(timed(ours), timed(theirs)) for _ in range(wanted.turns)]
    mine, its = (median(column) for column in zip(*seconds, strict=True))
    ratio = median(other / own for own, other in seconds)
    print(f"{wanted.height} x {wanted.width} px, {wanted.steps} steps, {torch.get_num_threads()} threads\n")
    print("| sampler | pictures a second | ours / it |")
    print("|---|---|---|")
    print(f"| ours | {1 / mine:.2f} | |")
    print(f"| Diffusers | {1 / its:.2f} | {ratio:.3f} |")
    print(
        f"\ncold: {first:.1f} s to the first picture of the bundled model, {first - mine:.1f} s of it before sampling"
    )


def pictures(wanted: argparse.Namespace) -> tuple[Callable[[], np.ndarray], Callable[[], np.ndarray]]:
    """Two functions that draw the same picture, as numbers of 255."""
    from diffusers import Flux2KleinPipeline

    cpu = torch.device("cpu")
    model = open_model(ModelSpec(family=wanted.family, path=wanted.model, title="bench", architecture_name="bench"))
    pipeline = Pipeline.open(model, PrecisionSpec(base="fp32"), {}, cpu, prompts=[PROMPT, ""])
    positive, negative = (pipeline.encoded(text).embeds for text in (PROMPT, ""))
    reference = Flux2KleinPipeline.from_pretrained(wanted.model, dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    size = {"height": wanted.height, "width": wanted.width}

    def ours() -> np.ndarray:
        return np.asarray(pipeline.generate(PROMPT, steps=wanted.steps, cfg_scale=SCALE, seed=7, **size))

    def theirs() -> np.ndarray:
        drawn: Any = reference(
            prompt_embeds=positive,
            negative_prompt_embeds=negative,
            num_inference_steps=wanted.steps,
            guidance_scale=SCALE,
            generator=torch.Generator().manual_seed(7),
            output_type="pil",
            **size,
        )
        return np.asarray(drawn.images[0])

    return ours, theirs


def timed(draw: Callable[[], np.ndarray]) -> float:
    start = time.perf_counter()
    draw()
    return time.perf_counter() - start


def cold() -> float:
    """Seconds from the start of `flux2-lora sample` to its end, one picture."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "flux2_lora", "sample", "prompts=[red apple]", "device=cpu", f"output={folder}/out"],
            check=True,
            capture_output=True,
            cwd=folder,
        )
        return time.perf_counter() - start


if __name__ == "__main__":
    main()
