"""What the pages tell a user to type: every command is one that its program takes, every option one that there is."""

from __future__ import annotations

import functools
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest

from flux2_lora import cli, config
from flux2_lora.bundled import share
from flux2_lora.run_options import RunOptions
from tests.options import options_of

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
COMMANDS = [path.stem for path in (share() / "configs").glob("*.yaml")]


def code_of(page: str) -> Iterator[str]:
    """Every line of a shell block, and every piece of code within a text."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
    for language, block in blocks.findall(text):
        yield from block.splitlines() if language == "sh" else ()
    yield from (piece.replace("\n", " ") for piece in re.findall(r"`([^`]+)`", blocks.sub("", text)))


def commands_of(page: str) -> list[list[str]]:
    """[command, option=value, ...] of every command of ours that names options."""
    found = []
    for line in code_of(page):
        _, _, ours = re.sub("-m flux2_lora", "flux2-lora", line).partition("flux2-lora ")
        words = [word for word in shlex.split(ours, comments=True) if word != "..."] if ours else []
        found += [words] if len(words) > 1 and words[0] in cli.PROGRAMS else []
    return found


@functools.cache
def schema_of(file: str, name: str) -> Any:
    """What the function `name` of a program takes; type hints are looked up in a module that stays."""
    spec = importlib.util.spec_from_file_location(f"docs_{Path(file).stem}", share() / file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return config.schema_of(getattr(module, name).__wrapped__)


def take(words: list[str]) -> None:
    """What the program does with these words before it looks at anything; of a sweep, its first run."""
    command, *options = words
    program = cli.PROGRAMS[command]
    if command == "inspect" and (place := cli._place(options)):
        command, program, options = "look_inside", cli._INSIDE, [f"adapter={place}", *options[1:]]
    schema = schema_of(program.file, "train" if command == "train" else "main")
    if "--multirun" in options:
        pairs = [option.partition("=") for option in options]
        options = [name + equals + config._items(value)[0] for name, equals, value in pairs if equals]
    options = [option for option in options if option not in ("--cfg", "job", "--help")]
    config.typed(config._compose(command, [config.literal(option, schema) for option in options]), schema)


@functools.cache
def known() -> set[str]:
    """Dotted names of all options, and groups; some stand on few pages of a group, as model.train_distilled does."""
    with hydra.initialize_config_dir(config_dir=str(share() / "configs"), version_base="1.3"):
        options = {name for command in COMMANDS for name in config._leaves(hydra.compose(config_name=command))}
    return {*options, *options_of(RunOptions), *config._groups(), "adapter", "hydra/launcher"}


@pytest.mark.parametrize("page", PAGES)
def test_every_command_on_a_page_is_taken(page: str) -> None:
    for words in commands_of(page):
        take(words)


@pytest.mark.parametrize("page", PAGES)
def test_every_option_on_a_page_is_one_that_there_is(page: str) -> None:
    pieces = [re.sub(r"'.*?'|\".*?\"|\{.*?\}", "x", piece) for piece in code_of(page) if " -m " not in piece]
    named = {name for piece in pieces for name in re.findall(r"(?<![\w.\-/])([a-z][\w./]*)=(?!=)", piece)}
    assert {name for name in named if name not in known() and not name.startswith("hydra.launcher.")} == set()
