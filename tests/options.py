"""The options that a dataclass declares."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints


def options_of(schema: Any, prefix: str = "") -> list[str]:
    """Dotted names of all options, import_ as import."""
    found: list[str] = []
    for entry in fields(schema):
        name, kind = prefix + entry.name.rstrip("_"), get_type_hints(schema)[entry.name]
        found += options_of(kind, f"{name}.") if is_dataclass(kind) else [name]
    return found
