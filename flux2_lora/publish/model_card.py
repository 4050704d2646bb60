"""README.md beside an export: what the hub shows of a LoRA. Only the user uploads it.

The head is what the hub reads (base model, licence, trigger), the rest is for people: samples, how to use the file, how
it was trained, and the proof.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from flux2_lora.export.header import About
from flux2_lora.export.proof import Proof, table
from flux2_lora.files import write_text
from flux2_lora.publish.run_card import ELSEWHERE, RunCard

_HUB_LICENCES = ("apache-2.0", "mit", "cc-by-4.0", "other")
_MOST_SAMPLES = 4
_TOLD = {
    "rank": "adapter.rank",
    "alpha": "adapter.alpha",
    "targets": "adapter.targets",
    "optimizer": "optimizer.kind",
    "learning rate": "optimizer.lr",
    "batch": "batch_size",
    "gradient accumulation": "grad_accumulation",
    "resolution": "dataset.resolution",
    "base stored in": "precision.base",
    "seed": "seed",
}


def write_model_card(
    folder: Path,
    file: Path,
    about: About,
    card: RunCard | None,
    proofs: Sequence[Proof],
    samples: Sequence[tuple[str, Path]],
) -> Path:
    """Write README.md and samples/ into `folder`; returns the page. samples: (prompt, picture), the best first."""
    shutil.rmtree(folder / "samples", ignore_errors=True)  # of an earlier export, which may have told more
    shown = []
    for index, (prompt, picture) in enumerate(samples[:_MOST_SAMPLES]):
        target = folder / "samples" / f"{index:04d}.png"
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(picture, target)
        shown.append((prompt, f"samples/{target.name}"))
    parts = [_head(about, card, shown), f"# {about.title}", *_body(file, about, card, proofs, shown)]
    page = folder / "README.md"
    write_text(page, "\n\n".join(parts) + "\n")
    return page


def _head(about: About, card: RunCard | None, shown: Sequence[tuple[str, str]]) -> str:
    values: dict[str, Any] = {
        "tags": ["lora", "text-to-image", "diffusers", "flux2-lora"],
        "pipeline_tag": "text-to-image",
    }
    base = _option(card, "model.path")
    here = isinstance(base, str) and Path(base).expanduser().exists()
    if isinstance(base, str) and base.count("/") == 1 and not here and not base.startswith((ELSEWHERE, "$", ".")):
        values["base_model"] = base
    if about.licence:
        hub = about.licence in _HUB_LICENCES
        values |= {"license": about.licence} if hub else {"license": "other", "license_name": about.licence}
    if about.trigger_phrase:
        values["instance_prompt"] = about.trigger_phrase
    if shown:
        values["widget"] = [{"text": prompt, "output": {"url": url}} for prompt, url in shown]
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---"


def _body(
    file: Path, about: About, card: RunCard | None, proofs: Sequence[Proof], shown: Sequence[tuple[str, str]]
) -> list[str]:
    use = [f"A LoRA for {about.base}."]
    if about.trigger_phrase:
        use.append(f"Write `{about.trigger_phrase}` in the prompt.")
    use.append("Strength 1 is as trained.")
    parts = [" ".join(use)]
    parts += [f"![{prompt}]({url})\n\n*{prompt}*" for prompt, url in shown]
    parts += ["## Use", _use(file)]
    if card is not None:
        parts += ["## Training", _training(card)]
    if about.licence:
        parts += [
            "## Licence",
            f"The base model is under {about.licence}; what its licence asks of derivatives holds here.",
        ]
    if proofs:
        parts += ["## What clients read", f"```\n{table(proofs)}\n```"]
    return parts


def _use(file: Path) -> str:
    return (
        f"ComfyUI, Forge: put `{file.name}` into `models/loras` (Forge: `models/Lora`). Diffusers:\n\n"
        f'```python\npipeline.load_lora_weights(".", weight_name={json.dumps(file.name)})\n```'
    )


def _training(card: RunCard) -> str:
    rows: list[tuple[str, Any]] = [("steps", card.step)] if card.step is not None else []
    rows += [(name, _option(card, option)) for name, option in _TOLD.items()]
    if card.learned is not None:
        rows.append(("pictures", f"{card.learned.count}, {card.learned.held_out} held out"))
    if {"base", "exported"} <= card.losses.keys():
        base, now = card.losses["base"], card.losses["exported"]
        rows.append(("validation loss", f"{base:.3f} (base), {now:.3f}"))
    rows += [(name, version) for name, version in card.versions.items() if name in ("flux2-lora", "torch", "diffusers")]
    lines = [f"| {name} | {_said(value)} |" for name, value in rows if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines])


def _option(card: RunCard | None, dotted: str) -> Any:
    value: Any = card.options if card is not None else {}
    for part in dotted.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _said(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
