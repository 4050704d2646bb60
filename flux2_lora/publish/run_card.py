"""The run card inside an exported file: the options of the run, what it learned from, with which versions, how well.

Law: a run can be made again from its card (`flux2-lora train from=file.safetensors`), and a card tells nothing of the
machine. What lies in this program's own folders is named by them, of other absolute paths the last part is kept behind
".../", and such an option must be given anew.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from safetensors import SafetensorError, safe_open

from flux2_lora import __version__
from flux2_lora.bundled import share
from flux2_lora.errors import UserError
from flux2_lora.export.header import RUN_CARD
from flux2_lora.files import without_folders
from flux2_lora.publish.learned import Learned, learned_of, read_learned
from flux2_lora.training.ranking import evaluated
from flux2_lora.training.tracking import read_metrics

ELSEWHERE = ".../"
"""Before the last part of a path that is not told."""
_LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors")
# Of the machine and not of the run.
LEFT_OUT = (
    "output_dir",
    "cache",
    "device",
    "processes",
    "loader_workers",
    "logger",
    "hardware",
    "resume",
    "allow_change",
    "from",
    "memory",
)
_TEXTS = ("prompts", "negative_prompt", "base_prompts", "trigger_word", "default_caption", "preserve_class")
# What folders and captions are called; left out on request.
_PRIVATE = (
    "name",
    *("dataset.folder", "dataset.hub", "dataset.sources", "dataset.import", "dataset.regularisation"),
    *("dataset.validation", "dataset.masks", "dataset.default_caption", "preview.prompts", "preview.negative_prompt"),
)


@dataclass(frozen=True, kw_only=True)
class RunCard:
    """options: nested, as run.yaml has them; step: of the checkpoint that was exported; versions: library -> version.

    losses: validation loss of the base, of `step` where it was measured, and the best one with its step.
    """

    options: Mapping[str, Any]
    step: int | None
    learned: Learned | None
    versions: Mapping[str, str] = field(default_factory=dict)
    losses: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, sort_keys=True)


def card_of_run(run: Path, step: int | None, *, private: bool) -> RunCard | None:
    """The card of a run's folder at a step; None where it holds no run. private: without captions and folder names."""
    page = run / "run.yaml"
    if not page.is_file():
        return None
    options = read_options(page)
    kept = {key: value for key, value in options.items() if key not in LEFT_OUT}
    learned = read_learned(run)
    if private:
        kept = _without(kept, _PRIVATE)
        if Path(str(options.get("model", {}).get("path"))).expanduser().exists():
            kept = _without(kept, ("model.path", "model.components"))
        learned = learned.strict(trigger_of(options)) if learned else None
    return RunCard(
        options=_portable(kept),
        step=step,
        learned=learned,
        versions={"flux2-lora": __version__, **{name: importlib.metadata.version(name) for name in _LIBRARIES}},
        losses=_losses(run, step),
    )


def read_options(page: Path) -> dict[str, Any]:
    """A run's run.yaml; UserError where it is damaged."""
    try:
        content = yaml.safe_load(page.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{page} cannot be read ({error})", "export the adapter's file itself") from error
    return content if isinstance(content, dict) else {}


def read_card(path: Path) -> RunCard:
    """The card inside a file; UserError where there is none."""
    remedy = "give a safetensors file that this program exported from a run"
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(RUN_CARD)
    except (SafetensorError, OSError) as error:
        raise UserError(f"from={path} is not a whole safetensors file ({error})", remedy) from error
    if text is None:
        raise UserError(f"from={path} carries no run card", remedy)
    try:
        content = json.loads(text)
        learned = content["learned"]
        return RunCard(
            options={str(key): value for key, value in content["options"].items()},
            step=None if content["step"] is None else int(content["step"]),
            learned=None if learned is None else learned_of(learned),
            versions=dict(content.get("versions", {})),
            losses=dict(content.get("losses", {})),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"from={path} carries a run card that cannot be read ({error})", remedy) from error


def trigger_of(options: Mapping[str, Any]) -> str | None:
    """dataset.trigger_word of a run's options."""
    found = options.get("dataset", {}).get("trigger_word")
    return str(found) if found else None


def options_of(card: RunCard) -> tuple[dict[str, Any], dict[str, str]]:
    """(dotted option -> value, dotted option -> last part of a path that must be given anew)."""
    leaves = dict(_leaves(card.options))
    lost = {name: ELSEWHERE for name, value in leaves.items() if ELSEWHERE in json.dumps(value)}
    lost = {name: leaves[name] if isinstance(leaves[name], str) else ELSEWHERE for name in lost}
    return {name: value for name, value in leaves.items() if name not in lost}, lost


def _losses(run: Path, step: int | None) -> dict[str, float]:
    rows = {at: row["validation_loss"] for at, row in evaluated(read_metrics(run / "metrics.jsonl")).items()}
    trained = {at: loss for at, loss in rows.items() if at > 0 and loss is not None}
    losses = {"base": rows[0]} if rows.get(0) is not None else {}
    if step in trained:
        losses["exported"] = trained[step]
    if trained:
        best = min(trained, key=lambda at: (trained[at], at))
        losses |= {"best": trained[best], "best_step": best}
    return losses


def _portable(value: Any) -> Any:
    """Without folders of the machine; prompts and captions may begin as a path does."""
    if isinstance(value, Mapping):
        return {key: part if key in _TEXTS else _portable(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_portable(part) for part in value]
    if not isinstance(value, str) or without_folders(value) == value:
        return value
    if Path(value).is_relative_to(share()):
        return f"${{share:{Path(value).relative_to(share()).as_posix()}}}"
    return ELSEWHERE + without_folders(value)


def _without(options: Mapping[str, Any], names: Sequence[str], prefix: str = "") -> dict[str, Any]:
    """The options without some by their dotted names."""
    return {
        key: _without(value, names, f"{prefix}{key}.") if isinstance(value, Mapping) else value
        for key, value in options.items()
        if f"{prefix}{key}" not in names
    }


def _leaves(options: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in options.items():
        name = f"{prefix}{key}"
        found += _leaves(value, f"{name}.") if isinstance(value, Mapping) and value else [(name, value)]
    return found
