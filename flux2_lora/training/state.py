"""Checkpoints: everything that a resumed run needs, as safetensors and JSON, complete or absent.

    checkpoints/step-000100/adapter.safetensors    the LoRA, PEFT's names
                            optimizer.safetensors  its moments
                            state.json             step and checksums

A folder gets its name by one rename, after all of its files are on the disk. Random state is not saved, since every
draw is a function of (seed, step, sample).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn

from flux2_lora.adapters import WEIGHTS, Adapter, load_state, read_adapter, save_adapter
from flux2_lora.errors import UserError
from flux2_lora.files import sync_folder, write_tensors, write_text

OPTIMIZER, STATE = "optimizer.safetensors", "state.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint on disk, `step` optimizer steps into the run."""

    folder: Path
    step: int


def save_checkpoint(run: Path, step: int, adapter: Adapter, optimizer: torch.optim.Optimizer) -> Checkpoint:
    """Write run/checkpoints/step-<step>; an unfinished folder of an earlier try is replaced."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    save_adapter(part / WEIGHTS, adapter)
    write_tensors(part / OPTIMIZER, _optimizer_tensors(optimizer))
    checksums = {name: _checksum(part / name) for name in (WEIGHTS, OPTIMIZER)}
    write_text(part / STATE, json.dumps({"step": step, "sha256": checksums}, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
    sync_folder(folder.parent)
    return Checkpoint(folder=folder, step=step)


def latest_checkpoint(run: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run; damaged ones are passed over."""
    for folder in sorted((run / "checkpoints").glob("step-*"), reverse=True):
        step = _whole(folder)
        if step is not None:
            return Checkpoint(folder=folder, step=step)
    return None


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`; UserError when it is absent or damaged."""
    step = _whole(folder)
    if step is None:
        raise UserError(f"resume={folder} is not a whole checkpoint", "use resume=auto for the newest whole one")
    return Checkpoint(folder=folder, step=step)


def restore(checkpoint: Checkpoint, transformer: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's adapter and moments into a freshly built run."""
    load_state(transformer, read_adapter(checkpoint.folder / WEIGHTS).state, source=str(checkpoint.folder))
    tensors = load((checkpoint.folder / OPTIMIZER).read_bytes())
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return {
        f"{index}.{key}": torch.as_tensor(value) for index, moments in state.items() for key, value in moments.items()
    }


def _whole(folder: Path) -> int | None:
    """The step of a checkpoint whose files are what its checksums say, else None."""
    try:
        state = json.loads((folder / STATE).read_text())
        sound = all(_checksum(folder / name) == expected for name, expected in state["sha256"].items())
        return int(state["step"]) if sound else None
    except (OSError, ValueError, KeyError):
        return None


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
