"""What a user types for text options reaches the program as typed."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from flux2_lora.config import _literal


@dataclass(frozen=True, kw_only=True)
class Group:
    targets: list[str] = field(default_factory=list)
    strengths: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Schema:
    group: Group
    folder: str
    word: str | None = None
    count: int = 1


def parsed(argument: str) -> object:
    """The value that Hydra makes of an argument after ours."""
    override = OverridesParser.create().parse_override(_literal(argument, Schema))
    return override.value()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("folder=/home/jo,ann/a=b (1)", "/home/jo,ann/a=b (1)"),
        ("folder='quoted, already'", "quoted, already"),
        ("word=it's", "it's"),
        ("word=null", None),
        ("count=3", 3),
        ("group.strengths=[0.5,1]", [0.5, 1]),
        ("group.targets=[attention,mlp]", ["attention", "mlp"]),
        ("group.targets=[double, single[5:10].attention:8]", ["double", "single[5:10].attention:8"]),
        ("group.targets=['a, b', \"c\"]", ["a, b", "c"]),
        ("group.targets=[it's one, of [two, three]]", ["it's one", "of [two, three]"]),
        ("group.targets=[]", []),
        (r'group.targets=["he said \"x\", y", z]', ['he said "x", y', "z"]),
        (r"group.targets=['it\'s', 'a' or 'b']", ["it's", "'a' or 'b'"]),
        (r"folder=C:\pics\rome", r"C:\pics\rome"),
        ("folder=C:\\pics\\", "C:\\pics\\"),
        (r"folder=\\server\it's", r"\\server\it's"),
        (r"group.targets=[C:\a\b, d]", [r"C:\a\b", "d"]),
    ],
)
def test_a_value_arrives_as_it_was_typed(argument: str, value: object) -> None:
    assert parsed(argument) == value
