"""The programs as a user starts them, in this process: one import of torch serves all tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from flux2_lora import cli


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code and both streams."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]
# A run of four steps that looks at nothing on its way.
SHORT = ("max_steps=4", "preview.every=0", "validation.every=4", "batch_size=4", "device=cpu")


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Run `flux2-lora <arguments>` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Outcome:
        capfd.readouterr()
        try:
            code = cli.main(list(arguments))
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        streams = capfd.readouterr()
        return Outcome(code or 0, streams.out, streams.err)

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of four steps on the demo set, made once, with one preview at each end."""
    outputs = tmp_path_factory.mktemp("trained")
    options = ("train", *SHORT, "preview.every=4", "preview.steps=2", f"output_dir={outputs}", "name=short")
    try:
        cli.main(list(options))
    except SystemExit as stop:
        if stop.code:
            raise RuntimeError(f"the run ended with exit code {stop.code}") from stop
    return outputs / "short"
