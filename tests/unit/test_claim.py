"""One run, one process: the second is refused with the pid of the first, and a dead one leaves nothing in the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flux2_lora.errors import UserError
from flux2_lora.training.claim import claimed

HOLD = """
import sys, time
from pathlib import Path
from flux2_lora.training.claim import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[str]:
    """Another process that holds tmp_path/run."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_is_refused_with_the_pid_of_the_first_and_a_killed_one_is_succeeded(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"another process \(pid {holder.pid} on "), claimed(tmp_path / "run"):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with claimed(tmp_path / "run"):
        assert (tmp_path / "run/.holder.json").is_file()


def test_a_claim_that_led_to_nothing_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="refused"), claimed(tmp_path / "outputs/run"):
        raise UserError("refused", "")
    assert list(tmp_path.iterdir()) == []


def test_a_claim_leaves_what_was_written(tmp_path: Path) -> None:
    with claimed(tmp_path / "run"):
        (tmp_path / "run/run.yaml").write_text("")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "run.yaml"}
