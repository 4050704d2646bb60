"""What bad input gets: one line what, one line remedy, exit code 2, nothing written, no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import Command


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of three pictures, two with captions."""
    folder = tmp_path / "pics"
    folder.mkdir()
    for index in range(3):
        Image.new("RGB", (80, 64), (index * 80, 100, 50)).save(folder / f"{index}.png")
    (folder / "0.txt").write_text("a first thing")
    (folder / "1.txt").write_text("a second thing")
    return folder


@pytest.mark.parametrize(
    ("options", "what", "remedy"),
    [
        (["adapter.rnak=8"], "adapter.rnak is not an option", "did you mean adapter.rank?"),
        (["rnak=8"], "rnak is not an option", "did you mean adapter.rank?"),
        (["optimzer=adamw"], "optimzer is not an option", "did you mean optimizer"),
        (["max_steps=1k"], "max_steps=1k is not a whole number", ""),
        (["adapter.rank=0"], "adapter.rank=0 is out of range", "at least 1"),
        (["optimizer.lr=-1"], "optimizer.lr=-1.0 is out of range", "above 0"),
        (["model=tyni"], "model=tyni is not a choice", "tiny"),
        (["model=flux2_small"], "model.path must be given", "model.path="),
        (["precision.base=fp9"], "precision.base=fp9 is not a choice", "fp8"),
        (["precision.matmul=fp8", "precision.base=int8"], "precision.matmul=fp8 multiplies", "precision.base=fp8"),
        (["adapter.targets=[atention]"], "adapter.targets names 'atention'", "did you mean attention?"),
        (["device=gpu0"], "device=gpu0 is not a device", "cpu"),
        (["dataset.folder=nowhere"], "dataset.folder=nowhere", ""),
        (["model.path=nowhere"], "model.path=nowhere does not exist", "a Diffusers folder, a hub id"),
        (["resume=nowhere"], "resume=nowhere is not a whole checkpoint", "resume=auto"),
    ],
)
def test_a_wrong_option_is_named_with_its_value_and_a_remedy(
    command: Command, tmp_path: Path, options: list[str], what: str, remedy: str
) -> None:
    outcome = command("train", *options)
    assert outcome.code == 2
    first, second = outcome.err.strip().splitlines()
    assert first.startswith("error: ")
    assert what in first
    assert second.startswith("  hint: ")
    assert remedy in second
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_refused(command: Command, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    outcome = command("train", "dataset.folder=empty")
    assert outcome.code == 2
    assert "dataset.folder=empty" in outcome.err
    assert not (tmp_path / "outputs").exists()


def test_pictures_without_captions_are_counted_and_named(command: Command, pictures: Path) -> None:
    outcome = command("train", f"dataset.folder={pictures}")
    assert outcome.code == 2
    assert "holds 3 images but 1 have no caption: 2.png" in outcome.err
    assert "dataset.default_caption" in outcome.err


def test_an_unreadable_picture_is_named_and_skipped(command: Command, pictures: Path) -> None:
    (pictures / "2.png").write_bytes(b"<html>not a picture</html>")
    outcome = command(
        "train", f"dataset.folder={pictures}", "dataset.default_caption=x", "max_steps=1", "preview.every=0"
    )
    assert outcome.code == 0
    assert "skipped 2.png" in outcome.out


def test_a_folder_of_unreadable_pictures_is_refused(command: Command, pictures: Path) -> None:
    for picture in pictures.glob("*.png"):
        picture.write_bytes(b"")
    outcome = command("train", f"dataset.folder={pictures}", "dataset.default_caption=x")
    assert outcome.code == 2
    assert "Traceback" not in outcome.err


def test_weights_that_are_missing_are_named(command: Command, tmp_path: Path) -> None:
    (tmp_path / "model" / "transformer").mkdir(parents=True)
    outcome = command("train", "model.path=model")
    assert outcome.code == 2
    assert "model.path=model lacks vae/, text_encoder/, tokenizer/" in outcome.err


def test_a_folder_name_may_hold_commas_spaces_and_equals_signs(command: Command, pictures: Path) -> None:
    strange = pictures.rename(pictures.with_name("jo,ann = pics (1)"))
    outcome = command("inspect", f"dataset.folder={strange}", "dataset.default_caption=a thing, drawn")
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("program", ["sample", "export"])
def test_an_adapter_that_is_not_there_is_refused(command: Command, program: str) -> None:
    option = "adapter=nowhere" if program == "export" else "adapters=[nowhere]"
    outcome = command(program, option)
    assert outcome.code == 2
    assert "nowhere holds no adapter" in outcome.err
