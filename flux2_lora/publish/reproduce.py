"""`flux2-lora train from=file.safetensors`: the options of the run that made a file, as if they had been typed.

What the user types besides goes before the card. An option whose value was a path of another machine must be typed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from flux2_lora.errors import UserError
from flux2_lora.options import quoted
from flux2_lora.publish.run_card import LEFT_OUT, options_of, read_card
from flux2_lora.run_options import RunOptions


def from_card(arguments: Sequence[str]) -> list[str]:
    """The arguments with those of the card before them, where `from=...` names a file.

    With "++", since the pages do not list every option that the schema has. A card comes from anybody: of it only
    options of a run are taken, and nothing that Hydra would resolve but places in this program's own folders.
    """
    place = next((argument.partition("=")[2] for argument in arguments if argument.startswith("from=")), "null")
    if place in ("", "null"):
        return list(arguments)
    place = place.strip("'\"")
    options, lost = options_of(read_card(Path(place).expanduser()))
    typed = {argument.partition("=")[0].lstrip("+") for argument in arguments}
    missing = {name: last for name, last in lost.items() if not typed & {name, *_groups(name)}}
    if missing:
        name, last = next(iter(missing.items()))
        raise UserError(f"from={place} was trained with {name}={last}, a path of another machine", f"add {name}=...")
    if not {*options, *typed} & {*_PICTURES, "dataset"}:
        raise UserError(f"from={place} does not tell which pictures it was trained on", "add dataset.folder=...")
    known = {name: value for name, value in options.items() if _is_option(name) and _is_plain(value)}
    kept = {name: value for name, value in known.items() if not typed & {name, *_groups(name)}}
    return [*(f"++{name}={_written(value)}" for name, value in kept.items()), *arguments]


_PICTURES = ("dataset.folder", "dataset.hub", "dataset.sources", "dataset.import")


def _is_option(name: str) -> bool:
    """Whether a run has this option, and takes it from a card."""
    first, *rest = name.split(".")
    kind: Any = None if first in LEFT_OUT else get_type_hints(RunOptions).get(first)
    for part in rest:
        kind = get_type_hints(kind).get(part, get_type_hints(kind).get(f"{part}_")) if is_dataclass(kind) else None
    return kind is not None and not is_dataclass(kind)


def _is_plain(value: Any) -> bool:
    """Whether nothing in it is resolved, but a place in this program's own folders."""
    if isinstance(value, Mapping):
        return all(_is_plain(part) for part in (*value, *value.values()))
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return not isinstance(value, str) or "${" not in value or re.fullmatch(r"\$\{share:[\w./-]+\}", value) is not None


def _groups(name: str) -> list[str]:
    """optimizer for optimizer.lr: a group that is chosen anew brings all of its options."""
    parts = name.split(".")[:-1]
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _written(value: Any) -> str:
    """A value in Hydra's grammar."""
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_written(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_written, value)) + "]"
    return json.dumps(value)
