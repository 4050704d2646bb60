"""Where a run starts: at a checkpoint of its own, or afresh.

Law: a run that goes on is the run that it was. Options and data are those that it began with, but for options that
change no number of the adapter, and but for what the user asks for by name (allow_change=true).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flux2_lora.config import changed_options, read_resolved
from flux2_lora.errors import UserError, listed
from flux2_lora.run_options import RunOptions
from flux2_lora.training.progress import console
from flux2_lora.training.state import Checkpoint, latest_checkpoint, open_checkpoint

# A resumed run may differ in these without being asked for it.
MAY_CHANGE = (
    "max_steps",
    "checkpoint_every",
    "keep_last",
    "keep_best",
    "preview.",
    "validation.every",
    "validation.patience",
    "checks",
    "resume",
    "from",
    "allow_change",
    "device",
    "processes",
    "loader_workers",
    "logger.",
    "cache.",
    "hardware.",
    "memory.resident_blocks",
    "memory.slots",
    "memory.plain_blocks",
    "memory.block_inputs",
    "memory.host",
    "memory.folder",
)
# In these it may not differ at all: the checkpoint's tensors would not fit, or mean something else.
MAY_NEVER_CHANGE = ("model.", "adapter.", "optimizer.kind", "optimizer.b_lr_ratio", "optimizer.block_lr")


def where_to_start(config: RunOptions) -> Checkpoint | None:
    """The checkpoint to go on from, or None to start afresh; UserError when the run there is another one."""
    if config.resume == "never":
        return None
    if config.resume == "auto":
        checkpoint = latest_checkpoint(config.folder, lambda f: console.print(f"{f} is damaged and passed over"))
    else:
        checkpoint = open_checkpoint(Path(config.resume).expanduser())
    changes = changed_options(read_resolved(config.folder / "run.yaml"), config, MAY_CHANGE) if checkpoint else []
    fixed = [change for change in changes if change.startswith(MAY_NEVER_CHANGE)]
    if fixed or (changes and not config.allow_change):
        ways = "choose another name=..., or resume=never to replace it"
        raise UserError(
            f"name={config.name} is a run with other options ({listed(fixed or changes, 3)})",
            ways if fixed else f"{ways}, or allow_change=true to go on all the same",
        )
    if changes:
        console.print(f"going on with other options: {listed(changes, 10)}")
    return checkpoint


def refuse_other_facts(config: RunOptions, checkpoint: Checkpoint | None, facts: Mapping[str, Any]) -> None:
    """UserError when a resumed run has not the pictures, captions, masks or processes that it began with."""
    if checkpoint is None:
        return
    names = {"data": "pictures, captions or masks", "processes": "a number of processes"}
    changed = [name for key, name in names.items() if checkpoint.facts.get(key) != facts[key]]
    if changed and not config.allow_change:
        raise UserError(
            f"name={config.name} was begun with other {' and '.join(changed)}",
            "choose another name=..., resume=never to replace it, or allow_change=true to go on all the same",
        )
