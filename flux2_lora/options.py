"""Limits of options, written where the option is: `rank: int = option(16, at_least=1)`.

Specs stay plain dataclasses; `check` walks a built one and words the first value that is out of its limits.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from flux2_lora.errors import UserError, did_you_mean

Spec = TypeVar("Spec")


def option(
    default: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    one_of: Sequence[str] = (),
) -> Any:
    """A dataclass field with a default and limits; null is always allowed where the type allows it."""
    limits = {"at_least": at_least, "above": above, "at_most": at_most, "one_of": tuple(one_of)}
    return dataclasses.field(default=default, metadata=limits)


def check(spec: Any, prefix: str = "") -> None:
    """UserError for the first value, in reading order, outside the limits of its option; `prefix` ends in a dot."""
    for field in dataclasses.fields(spec):
        value, name = getattr(spec, field.name), prefix + field.name.rstrip("_")
        for place, part in _parts(name, value):
            if dataclasses.is_dataclass(part):
                check(part, f"{place}.")
            elif field.metadata and part is not None:
                _check_value(place, part, field.metadata)


def _parts(name: str, value: Any) -> list[tuple[str, Any]]:
    """A value, or each of a list, with the name that a user would give it."""
    if not isinstance(value, list):
        return [(name, value)]
    one = len(value) == 1 and not dataclasses.is_dataclass(value[0])  # a list of one may be written as that one
    return [(name if one else f"{name}[{place}]", part) for place, part in enumerate(value)]


def _check_value(name: str, value: Any, limits: Any) -> None:
    if limits.get("one_of"):
        if value not in limits["one_of"]:
            raise UserError(f"{name}={value} is not a choice", did_you_mean(str(value), limits["one_of"]))
        return
    low, above, high = limits.get("at_least"), limits.get("above"), limits.get("at_most")
    too_low = (low is not None and not value >= low) or (above is not None and not value > above)  # nan is neither
    if too_low or (high is not None and not value <= high):
        bounds = [f"at least {low}"] if low is not None else [f"above {above}"] if above is not None else []
        bounds += [f"at most {high}"] if high is not None else []
        raise UserError(f"{name}={value} is out of range", f"give a value of {' and '.join(bounds)}")


def from_mapping(schema: type[Spec], values: Mapping[str, Any]) -> Spec:
    """A spec of values that were resolved and checked once, as a run's run.yaml has them; others are left out."""
    kinds, given = typing.get_type_hints(schema), {}
    for field in dataclasses.fields(typing.cast("Any", schema)):
        if field.name in values:
            value, kind = values[field.name], kinds[field.name]
            nested = isinstance(kind, type) and dataclasses.is_dataclass(kind)
            given[field.name] = from_mapping(kind, value) if nested else value
    return schema(**given)


def quoted(text: str) -> str:
    """A text in quotes of Hydra's grammar; one that is quoted, or an interpolation, as it is."""
    if text.startswith("${") or re.fullmatch(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\"""", text):
        return text
    return "'" + re.sub(r"(\\*)('|$)", _escaped, text) + "'"


def _escaped(found: re.Match[str]) -> str:
    """Backslashes before a quote or the end are doubled, others stay as they are: so Hydra reads them."""
    return 2 * found[1] + ("\\'" if found[2] else "")
