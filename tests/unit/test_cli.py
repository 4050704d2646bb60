"""The command table: what answers at once, what a refusal says, and how a program is started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flux2_lora import __version__, bundled, cli

# What costs the seconds of a start; each is imported by the programs.
HEAVY = {"torch", "numpy", "hydra", "omegaconf", "diffusers", "transformers", "peft", "accelerate", "PIL"}

ASK = """
import sys, time
from flux2_lora.cli import main
code = main(sys.argv[1:])
print(code, time.process_time(), *{name.partition(".")[0] for name in sys.modules}, file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"], ["trian"], ["train", "--help"]], ids=" ".join)
def test_help_version_and_refusals_take_less_than_half_a_second_and_import_nothing_heavy(arguments: list[str]) -> None:
    asked = subprocess.run([sys.executable, "-c", ASK, *arguments], capture_output=True, text=True, check=True)
    _, seconds, *modules = asked.stderr.splitlines()[-1].split()
    assert HEAVY.isdisjoint(modules)
    # Measured: 0.04 s of processor time, and 2 s with torch. Not wall time: a busy computer is no failure.
    assert float(seconds) < 0.5


def test_help_lists_every_command_with_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, program in cli.PROGRAMS.items():
        assert any(line.split(maxsplit=1) == [name, program.does] for line in lines)


def test_no_arguments_print_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    help_text = capsys.readouterr().out
    assert cli.main([]) == 0
    assert capsys.readouterr().out == help_text


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"flux2-lora {__version__}\n"


def test_a_misspelt_command_is_answered_with_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian", "model=tiny"]) == 2
    said = capsys.readouterr()
    assert said.err == "error: trian is not a command\n  hint: did you mean train?\n"
    assert said.out == ""


def test_an_option_in_place_of_a_command_is_answered_with_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["model=tiny"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: model=tiny is not a command\n  hint: one of: ")
    assert all(name in said for name in cli.PROGRAMS)


@pytest.fixture
def share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A share folder whose train program does what the test writes into it."""
    (tmp_path / "train").mkdir()
    monkeypatch.setattr(cli, "share", lambda: tmp_path)
    monkeypatch.setattr(sys, "argv", ["flux2-lora"])
    return tmp_path


def test_a_command_runs_its_program_as_main_with_the_overrides(share: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = share / "train/lora.py"
    program.write_text("import sys\nprint(__name__, *sys.argv, sep='|')\n")
    assert cli.main(["train", "max_steps=4", "name=a b"]) == 0
    assert capsys.readouterr().out == f"__main__|{program}|max_steps=4|name=a b\n"


def test_the_exit_code_of_a_program_is_that_of_the_command(share: Path) -> None:
    (share / "train/lora.py").write_text("import sys\nsys.exit(130)\n")
    with pytest.raises(SystemExit) as ended:
        cli.main(["train"])
    assert ended.value.code == 130


@pytest.mark.parametrize("name", cli.PROGRAMS)
def test_every_command_has_its_program(name: str) -> None:
    assert (bundled.share() / cli.PROGRAMS[name].file).is_file()


def test_an_interrupted_program_says_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("runpy.run_path", interrupted)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["prepare"])
    assert stopped.value.code == 130
    assert "the same command goes on from there" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch has expandable segments on Linux")
@pytest.mark.parametrize("given", [None, "backend:native"])
def test_a_program_starts_with_expandable_segments_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", given or "")
    if given is None:
        monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    found: list[str] = []
    monkeypatch.setattr(cli.runpy, "run_path", lambda *_, **__: found.append(os.environ["PYTORCH_CUDA_ALLOC_CONF"]))
    monkeypatch.setattr(sys, "argv", [])
    assert cli.main(["plan"]) == 0
    assert found == [given or "expandable_segments:True"]
