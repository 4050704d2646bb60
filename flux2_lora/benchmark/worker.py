"""A process that holds one base and trains on what it is asked to, seen from the one that asks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, cast

LIMIT_S = 240
Answer = dict[str, Any]


class Worker:
    """A process that answers questions, each a line of JSON; a context that ends it."""

    def __init__(self, setting: Mapping[str, Any], folder: Path) -> None:
        self.errors = tempfile.NamedTemporaryFile("w+", dir=folder, suffix=".txt")  # noqa: SIM115 - ends with it
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flux2_lora.benchmark.serve", json.dumps(setting)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )

    def ask(self, **question: Any) -> Answer:
        """Its answer; or {"failed": why} where it ended, or did not answer in time."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return self.why()
        return self.answer()

    def answer(self) -> Answer:
        """The next one; of a worker that loads early, the first says only that it did."""
        assert self.process.stdout is not None
        clock = threading.Timer(LIMIT_S, self.process.kill)
        clock.start()
        line = next((line for line in self.process.stdout if line.startswith("{")), None)
        clock.cancel()
        return self.why() if line is None else cast("Answer", json.loads(line))

    def why(self) -> Answer:
        """Of a process that ended."""
        if self.process.wait() < 0:
            return {"failed": f"ended by signal {-self.process.returncode}: {LIMIT_S} s were over, or host memory was"}
        self.errors.seek(0)
        return {"failed": last_line(self.errors.read())}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let it go, and all that it holds; a second time does nothing."""
        self.process.communicate()
        self.errors.close()


def last_line(text: str) -> str:
    """The last line that says something, short enough for a table."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("hint")]
    return (lines or ["it said nothing"])[-1].replace("|", "/")[:120]
