"""From trained parts to what is committed: the miniature as a Diffusers folder, and the pictures of the demo styles."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from flux2_lora.miniature.icons import DEMOS, INK, POSTER, Drawings, IconSet, load_labels, slug
from flux2_lora.miniature.subjects import COMMON, OTHERS

MOST_BYTES = 20_000_000
# Words that mean nothing to the base.
TRIGGERS = {INK: "inkline", POSTER: "threeink"}
PROMPTS = ("grinning face", "cat face", "red apple", "crescent moon")


def write_model(work: Path, destination: Path) -> None:
    """The model in bf16, without the model card."""
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import AutoTokenizer, T5EncoderModel

    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=256),
        vae=AutoencoderKLFlux2.from_pretrained(work / "vae", torch_dtype=torch.bfloat16),
        text_encoder=T5EncoderModel.from_pretrained(work / "text_encoder", torch_dtype=torch.bfloat16),
        tokenizer=AutoTokenizer.from_pretrained(work / "tokenizer"),
        transformer=Flux2Transformer2DModel.from_pretrained(work / "transformer", torch_dtype=torch.bfloat16),
        is_distilled=False,
    )
    pipeline.save_pretrained(destination)
    for config in destination.glob("*/config.json"):
        values = json.loads(config.read_text())
        values.pop("_name_or_path", None)
        config.write_text(json.dumps(values, indent=2) + "\n")
    size = sum(file.stat().st_size for file in destination.rglob("*") if file.is_file())
    print(f"{destination}: {size / 1e6:.2f} MB")
    if size > MOST_BYTES:
        raise SystemExit("the bundled model must stay within 20 MB")


def write_demo(work: Path, icon_set: IconSet, destination: Path, *, trigger: str) -> None:
    """28 pictures to train on and the common subjects to validate with, 128 px, each with its caption.

    No common subject is trained, so what is drawn of them has to come from the base.
    """
    drawings, labels = Drawings(work, icon_set), {label.name: label for label in load_labels(work)}
    order = torch.randperm(len(OTHERS), generator=torch.Generator().manual_seed(0)).tolist()
    drawn = [name for name in (OTHERS[i] for i in order) if drawings.drawn(labels[name], 8) is not None]
    for part, names in {"": drawn[:28], "validation": [*PROMPTS, *(n for n in COMMON if n not in PROMPTS)]}.items():
        folder = destination / part
        folder.mkdir(parents=True, exist_ok=True)
        for old in [*folder.glob("*.png"), *folder.glob("*.txt")]:
            old.unlink()
        for name in names:
            picture = drawings.drawn(labels[name], 128)
            if picture is not None:
                picture.save(folder / f"{slug(name)}.png", optimize=True)
                (folder / f"{slug(name)}.txt").write_text(f"{name}, {trigger} style\n")
    prompts = "".join(f"{name}, {trigger} style\n" for name in PROMPTS)
    (destination / "prompts.txt").write_text(prompts)


def write_demos(work: Path, destination: Path) -> None:
    """data/demo, the default, and data/demo_poster."""
    for icon_set, folder in zip(DEMOS, ("demo", "demo_poster"), strict=True):
        write_demo(work, icon_set, destination / folder, trigger=TRIGGERS[icon_set])
