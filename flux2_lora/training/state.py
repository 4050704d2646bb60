"""Checkpoints: everything that a resumed run needs, as safetensors and JSON, complete or absent.

    checkpoints/step-000100/adapter.safetensors    the LoRA as it is shown and exported, PEFT's names
                            trained.safetensors    as it is trained, where that is another: EMA, schedule-free
                            optimizer.safetensors  the optimizer's tensors
                            state.json             step, counters, the optimizer's numbers, checksums

A folder gets its name by one rename, after all of its files are on the disk. Random state is not saved, since every
draw is a function of (seed, step, sample).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn

from flux2_lora.adapters import WEIGHTS, Adapter, load_state, read_adapter, save_adapter, state_of
from flux2_lora.errors import RunError, UserError
from flux2_lora.files import sync_folder, write_tensors, write_text
from flux2_lora.training.averaging import Ema, averages, shown

TRAINED, OPTIMIZER, STATE = "trained.safetensors", "optimizer.safetensors", "state.json"


@dataclass(kw_only=True)
class TrainState:
    """What a run carries from step to step. step: optimizer steps done, skipped ones included.

    skipped: how many steps were left out because their numbers were not finite; failing: how many of them in a row.
    """

    transformer: nn.Module
    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: Ema | None = None
    step: int = 0
    skipped: int = 0
    failing: int = 0

    def adapter(self) -> dict[str, Tensor]:
        """The adapter's tensors as they are shown."""
        with shown(self.optimizer, self.ema, list(self.parameters.values())):
            return state_of(self.transformer)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint on disk, `step` optimizer steps into the run; facts: what the run noted down beside it."""

    folder: Path
    step: int
    facts: Mapping[str, Any] = field(default_factory=dict)


def save_checkpoint(run: Path, state: TrainState, adapter: Adapter, facts: Mapping[str, Any]) -> Checkpoint:
    """Write run/checkpoints/step-<step>; one of that step that is there already is replaced at the end.

    RunError, and nothing written, when a number of the adapter is not finite.
    """
    if not all(bool(torch.isfinite(tensor).all()) for tensor in adapter.state.values()):
        raise RunError(
            f"the adapter is not finite after step {state.step}, so it was not saved",
            "go on from the last checkpoint with a lower optimizer.lr (allow_change=true)",
        )
    folder = _folder(run, state.step)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        _write(part, state, adapter, facts)
        _put_in_place(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return Checkpoint(folder=folder, step=state.step, facts=facts)


def _write(part: Path, state: TrainState, adapter: Adapter, facts: Mapping[str, Any]) -> None:
    save_adapter(part / WEIGHTS, adapter)
    if averages(state.optimizer, state.ema):
        write_tensors(part / TRAINED, state_of(state.transformer))
    tensors, numbers = _parted(state.optimizer.state_dict())
    write_tensors(part / OPTIMIZER, tensors)
    content = {
        "step": state.step,
        "skipped": state.skipped,
        "failing": state.failing,
        "ema_updates": state.ema.updates if state.ema else 0,
        "facts": dict(facts),
        "optimizer": numbers,
        "sha256": {file.name: _checksum(file) for file in sorted(part.glob("*.safetensors"))},
    }
    content["sha256"][STATE] = _checksum_of(content)
    write_text(part / STATE, json.dumps(content, indent=1))


def _put_in_place(part: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(part, folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def latest_checkpoint(run: Path, damaged: Callable[[Path], None] = lambda _folder: None) -> Checkpoint | None:
    """The newest whole checkpoint of a run; `damaged` is told each one that is passed over."""
    for folder in sorted((run / "checkpoints").glob("step-*"), reverse=True):
        checkpoint = _whole(folder)
        if checkpoint is not None:
            return checkpoint
        damaged(folder)
    return None


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`; UserError when it is absent or damaged."""
    checkpoint = _whole(folder)
    if checkpoint is None:
        raise UserError(f"resume={folder} is not a whole checkpoint", "use resume=auto for the newest whole one")
    return checkpoint


def restore(checkpoint: Checkpoint, state: TrainState) -> None:
    """Put a checkpoint back into a freshly built run; rate factors and weight decay stay what the run's options say."""
    content = json.loads((checkpoint.folder / STATE).read_text())
    source = str(checkpoint.folder)
    load_state(state.transformer, read_adapter(checkpoint.folder / WEIGHTS).state, source=source)
    if state.ema is not None:
        state.ema.restore(list(state.parameters.values()), content["ema_updates"])
    if (checkpoint.folder / TRAINED).is_file():
        load_state(state.transformer, load((checkpoint.folder / TRAINED).read_bytes()), source=source)
    saved = _joined(content["optimizer"], load((checkpoint.folder / OPTIMIZER).read_bytes()))
    saved["state"] = {int(index): moments for index, moments in saved["state"].items()}
    for group, fresh in zip(saved["param_groups"], state.optimizer.param_groups, strict=True):
        group |= {key: fresh[key] for key in ("lr_scale", "weight_decay") if key in fresh}
    state.optimizer.load_state_dict(saved)
    state.step, state.skipped, state.failing = checkpoint.step, content["skipped"], content["failing"]


def prune_checkpoints(run: Path, keep_last: int, best: int | None) -> None:
    """Delete all but the newest `keep_last` checkpoints (0: none is deleted) and the one of step `best`."""
    if keep_last == 0:
        return
    kept = {_folder(run, best)} if best is not None else set()
    for folder in sorted((run / "checkpoints").glob("step-*"), reverse=True)[keep_last:]:
        if folder not in kept:
            _delete(folder)


def delete_all(run: Path) -> None:
    """Delete every checkpoint of a run that is begun again, and what is left of unfinished ones."""
    for folder in (run / "checkpoints").glob("*step-*"):
        _delete(folder)


def set_aside(run: Path, after: int) -> None:
    """Rename checkpoints of later steps, damaged ones say: a run that goes on before them must not meet them again."""
    for folder in (run / "checkpoints").glob("step-*"):
        if folder.name > _folder(run, after).name:
            aside = folder.with_name(f"aside-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)


def _delete(folder: Path) -> None:
    """Under another name first: a folder that is half deleted is not met as a damaged checkpoint."""
    old = folder.with_name(f".{folder.name.strip('.')}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(folder, old)
    shutil.rmtree(old, ignore_errors=True)


def _folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def _parted(tree: Any, name: str = "") -> tuple[dict[str, Tensor], Any]:
    """Tensors by their place in nested dictionaries and lists, and the same tree for JSON with their names instead."""
    if isinstance(tree, Tensor):
        return {name: tree.clone()}, {"tensor": name}
    if isinstance(tree, Mapping):
        parts = {str(key): _parted(value, f"{name}.{key}".lstrip(".")) for key, value in tree.items()}
        return _merged([part[0] for part in parts.values()]), {key: part[1] for key, part in parts.items()}
    if isinstance(tree, list | tuple):
        listed = [_parted(value, f"{name}.{place}") for place, value in enumerate(tree)]
        plain = [part[1] for part in listed]
        return _merged([part[0] for part in listed]), {"tuple": plain} if isinstance(tree, tuple) else plain
    return {}, tree


def _merged(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor for part in parts for name, tensor in part.items()}


def _joined(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `_parted` took apart; keys stay texts."""
    if isinstance(plain, list):
        return [_joined(value, tensors) for value in plain]
    if not isinstance(plain, dict):
        return plain
    if plain.keys() == {"tensor"}:
        return tensors[plain["tensor"]]
    if plain.keys() == {"tuple"}:
        return tuple(_joined(plain["tuple"], tensors))
    return {key: _joined(value, tensors) for key, value in plain.items()}


def _whole(folder: Path) -> Checkpoint | None:
    """The checkpoint whose files are what its checksums say, else None."""
    try:
        content = json.loads((folder / STATE).read_text())
        sums = content["sha256"]
        own = sums.pop(STATE)
        sound = own == _checksum_of(content) and all(_checksum(folder / name) == sums[name] for name in sums)
        return Checkpoint(folder=folder, step=int(content["step"]), facts=content["facts"]) if sound else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
