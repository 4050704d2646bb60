"""The two kinds of folder: a library that is imported, and programs that nobody imports."""

from __future__ import annotations

import ast
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM_FOLDERS = ("train", "data", "scripts")
TOP_LEVEL = {
    *("train", "data", "scripts", "configs", "flux2_lora", "tests", "docs"),
    *("README.md", "CHANGELOG.md", "LICENSE", "NOTICE", "pyproject.toml", "Makefile"),
    *(".ci", ".editorconfig", ".gitignore", ".pre-commit-config.yaml"),
}


def tracked() -> list[Path]:
    """Files under version control, relative to the root; the test is skipped where there is none."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True)
    names = listed.stdout.split("\0")[:-1]
    if not names:
        pytest.skip("nothing is tracked yet")
    return [Path(name) for name in names]


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a file imports; a relative import starts with a dot."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_only_planned_names_stand_at_the_top() -> None:
    assert {path.parts[0] for path in tracked()} - TOP_LEVEL == set()


def test_of_data_only_programs_and_what_is_bundled_are_tracked() -> None:
    inside = [path for path in tracked() if path.parts[0] == "data"]
    others = [path for path in inside if path.parts[1] not in ("demo", "demo_poster", "tiny")]
    assert [path for path in others if len(path.parts) > 2 or path.suffix != ".py"] == []


def test_no_lock_file_is_tracked() -> None:
    assert [path for path in tracked() if path.name == "uv.lock"] == []


def test_program_folders_are_no_packages() -> None:
    assert [path for path in sources(*PROGRAM_FOLDERS, "configs") if path.name == "__init__.py"] == []


def test_program_folders_hold_one_level_of_programs() -> None:
    programs = sources(*PROGRAM_FOLDERS)
    assert programs
    assert [path for path in programs if path.parent.parent != ROOT] == []


def test_programs_are_imported_by_nobody() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in sources(*PROGRAM_FOLDERS, "flux2_lora", "tests")
        for name in imported(path)
        if name.split(".")[0] in (*PROGRAM_FOLDERS, "configs")
    }
    assert found == set()


def test_programs_import_only_the_library_of_this_project() -> None:
    neighbours = {path.stem for path in sources(*PROGRAM_FOLDERS)} | {"tests"}
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in sources(*PROGRAM_FOLDERS)
        for name in imported(path)
        if name.split(".")[0] in neighbours | {""}
    }
    assert found == set()
