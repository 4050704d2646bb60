"""The two exceptions that a user is meant to meet: what is wrong, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches


class _TwoLines(Exception):  # noqa: N818 - its kinds are the errors
    """What is wrong, and the next action, each on a line."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"error: {self.what}\n  hint: {self.remedy}"


class UserError(_TwoLines):
    """Wrong input. `what` names the option, its value and the fact; `remedy` names the next action.

    Programs print both lines, write nothing and exit with code 2.
    """


class RunError(_TwoLines):
    """A run that cannot go on, though nothing was wrong with its options. Programs print both lines and exit with 1."""


def did_you_mean(wrong: str, known: Sequence[str]) -> str:
    """ "did you mean X?" for the nearest of `known`, else the list of them."""
    near = get_close_matches(wrong, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else f"one of: {', '.join(sorted(known))}"


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first `most` names with commas, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
