"""The command `flux2-lora`: one table from a command to the program file that it runs.

Law: the table, the help and a refusal answer at once. Whatever needs torch or Hydra is imported by the program, so that
a misspelt command does not cost the seconds of a start.
"""

from __future__ import annotations

import ast
import os
import re
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from flux2_lora import __version__
from flux2_lora.bundled import share
from flux2_lora.errors import UserError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Program:
    """A file below `bundled.share()`, and what it does in one line."""

    file: str
    does: str


PROGRAMS = {
    "train": Program(file="train/lora.py", does="train an adapter: prepare, learn, validate, preview, export"),
    "prepare": Program(file="data/prepare.py", does="fill the latent and text caches of a folder of pictures"),
    "caption": Program(file="data/caption.py", does="write captions beside pictures, by a local Florence-2 or BLIP"),
    "inspect": Program(file="data/look.py", does="dry run on a folder, or what a LoRA file is and who will load it"),
    "plan": Program(
        file="scripts/plan.py", does="will it fit on a card, and how long will it take: memory and seconds"
    ),
    "sample": Program(file="scripts/sample.py", does="grids of pictures from prompts, by adapters and strengths"),
    "edit": Program(file="scripts/edit.py", does="inpaint, outpaint, image to image"),
    "export": Program(
        file="scripts/export.py", does="one file for ComfyUI, Forge or Diffusers, verified after writing"
    ),
    "merge": Program(file="scripts/merge.py", does="several adapters as one, or folded into the base"),
}
_INSIDE = Program(file="scripts/look_inside.py", does="what a LoRA file is, and who will load it")

_HELP = """\
usage: flux2-lora COMMAND [option=value ...]

Train a personal-style LoRA for a Flux.2-class model on a small GPU, and export one file that provably works.

commands:
{commands}

flux2-lora COMMAND --help      says what a command does and names its options.
flux2-lora COMMAND --cfg job   prints every option of a command with its value.
flux2-lora --version           prints the version.
With no options every command runs on the bundled tiny model and picture set, on a CPU.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program that the first argument names with the rest; returns the exit code."""
    command, *overrides = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help", "help"):
        print(_HELP.format(commands=_listing()), end="")
    elif command in ("-V", "--version"):
        print(f"flux2-lora {__version__}")
    elif command in PROGRAMS and {"-h", "--help"} & set(overrides):
        print(_explained(command))
    elif command == "inspect" and (place := _place(overrides)) is not None:
        _run(_INSIDE, [f"adapter={place}", *(given for given in overrides if given != place)])
    elif command in PROGRAMS:
        _run(PROGRAMS[command], overrides)
    else:
        print(UserError(f"{command} is not a command", did_you_mean(command, list(PROGRAMS))), file=sys.stderr)
        return 2
    return 0


def _place(overrides: Sequence[str]) -> str | None:
    """The argument that is no option: a LoRA file, a run or a checkpoint to look into."""
    named = (given for given in overrides if not re.match(r"[\w.+~@/]+=", given) or given.endswith(".safetensors"))
    return next((given for given in named if not given.startswith(("-", "output=", "adapter="))), None)


def _listing() -> str:
    widest = max(map(len, PROGRAMS))
    return "\n".join(f"  {name:{widest}}  {program.does}" for name, program in PROGRAMS.items())


def _explained(command: str) -> str:
    """The program's own first words and its page of options, read as text: nothing is imported."""
    program = (share() / PROGRAMS[command].file).read_text(encoding="utf-8")
    page = (share() / "configs" / f"{command}.yaml").read_text(encoding="utf-8")
    options = page.partition("# Run folders are")[0].strip()
    if command == "inspect":
        inside = (share() / _INSIDE.file).read_text(encoding="utf-8")
        program = f'"""{ast.get_docstring(ast.parse(program))}\n\n{ast.get_docstring(ast.parse(inside))}"""'
    return f"{ast.get_docstring(ast.parse(program))}\n\nOptions (configs/{command}.yaml):\n\n{options}"


def _run(program: Program, overrides: Sequence[str]) -> None:
    path = str(share() / program.file)
    sys.argv = [path, *overrides]
    if sys.platform == "linux":  # PyTorch has it there; what it reserves is then what a plan counts, with few holes
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    try:
        runpy.run_path(path, run_name="__main__")
    except KeyboardInterrupt:
        print(
            "stopped; what was encoded or saved so far is kept, and the same command goes on from there",
            file=sys.stderr,
        )
        sys.exit(130)
