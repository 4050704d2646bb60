"""One run, one process: a run folder is claimed before anything in it is read or written.

The operating system holds the lock and lets go of it when the process ends, however it ends; so a lock that a killed
run left behind is taken over, and one that is held is held by a live process.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from flux2_lora.errors import UserError

_LOCK, _HOLDER = ".lock", ".holder.json"


@contextmanager
def claimed(run: Path) -> Iterator[None]:
    """Hold `run` for this process; UserError that names the holder where another has it.

    A folder that is still empty at the end, as after refused options, is removed again.
    """
    made = [folder for folder in (run, *run.parents) if not folder.exists()]
    run.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{run} is being trained by another process{_holder(run)}", "wait for it, or choose another name=..."
        ) from None
    (run / _HOLDER).write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
    try:
        yield
    finally:
        (run / _HOLDER).unlink(missing_ok=True)
        if {path.name for path in run.iterdir()} <= {_LOCK}:
            (run / _LOCK).unlink(missing_ok=True)
            with suppress(OSError):
                for folder in made:
                    folder.rmdir()
        lock.release()


def _holder(run: Path) -> str:
    """ " (pid 123 on host)", as far as it is known."""
    try:
        holder = json.loads((run / _HOLDER).read_text())
        return f" (pid {holder['pid']} on {holder['host']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
