"""`flux2-lora train from=file.safetensors`: the options of the run that made a file, as if they had been typed.

What the user types besides goes before the card. An option whose value was a path of another machine must be typed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flux2_lora.errors import UserError
from flux2_lora.options import quoted
from flux2_lora.publish.run_card import options_of, read_card


def from_card(arguments: Sequence[str]) -> list[str]:
    """The arguments with those of the card before them, where `from=...` names a file.

    With "++", since the pages do not list every option that the schema has.
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
    kept = {name: value for name, value in options.items() if not typed & {name, *_groups(name)}}
    return [*(f"++{name}={_written(value)}" for name, value in kept.items()), *arguments]


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
