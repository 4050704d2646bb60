"""The benchmark's one command, on small shapes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/bench_gpu.py"


@pytest.mark.slow
def test_one_command_prints_a_row_for_each_case_and_ratios_of_the_same_run() -> None:
    command = [sys.executable, SCRIPT, "--small", "--models", "klein_9b", "--ways", "streamed"]
    outcome = subprocess.run([*command, "--rounds", "1", "--steps", "1"], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in outcome.stdout.splitlines() if "|" in line]
    measured = {tuple(row[1:4]): float(row[4]) for row in rows if row[1] in ("resident", "streamed")}
    sizes = [("4 x 64", ""), ("1 x 32", "8"), ("1 x 64", "")]
    assert measured.keys() == {("streamed", *one) for one in sizes} | {("resident", size, "") for size, _ in sizes}
    ratios = {row[1]: float(row[2]) for row in rows if row[1].endswith(" / resident")}
    expected = measured["streamed", "4 x 64", ""] / measured["resident", "4 x 64", ""]
    assert ratios["streamed 4 x 64 / resident"] == pytest.approx(expected, abs=0.002)
    assert len(ratios) == 3
