"""Which options a run that goes on may differ in."""

from __future__ import annotations

import pytest

from flux2_lora.run.resume import MAY_CHANGE, MAY_NEVER_CHANGE
from flux2_lora.run_options import RunOptions
from tests.options import options_of


@pytest.mark.parametrize("rule", [*MAY_CHANGE, *MAY_NEVER_CHANGE])
def test_every_rule_speaks_of_an_option_that_there_is(rule: str) -> None:
    assert [name for name in options_of(RunOptions) if name == rule or (rule[-1] == "." and name.startswith(rule))]


def test_no_option_may_change_and_never_change() -> None:
    assert [
        name for name in options_of(RunOptions) if name.startswith(MAY_CHANGE) and name.startswith(MAY_NEVER_CHANGE)
    ] == []


def test_no_rule_reaches_an_option_that_only_begins_like_its_own() -> None:
    """Rules are prefixes: `resume` would also free an option `resume_anything`."""
    whole = [rule for rule in (*MAY_CHANGE, *MAY_NEVER_CHANGE) if rule[-1] != "."]
    assert [name for name in options_of(RunOptions) for rule in whole if name.startswith(rule) and name != rule] == []
