"""Every family from pictures to pictures: train, resume, export, sample with the adapter; on random miniatures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Command
from tests.miniatures import MINIATURES
from tests.programs.conftest import SHORT


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    """Four small pictures with captions of words that the miniatures know."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, word in enumerate(("apple", "cat", "face", "photo")):
        Image.new("RGB", (40, 40), (60 * index, 100, 50)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a red {word}")
    return f"dataset.folder={folder}"


@pytest.mark.parametrize("name", MINIATURES)
def test_a_family_trains_exports_and_samples_with_its_adapter(
    name: str, pictures: str, command: Command, tmp_path: Path
) -> None:
    miniature = MINIATURES[name]
    miniature.build(tmp_path / "model")
    model = (f"model={miniature.model}", "model.path=model", "device=cpu")
    short = ("max_steps=2", "batch_size=1", "validation.every=2", "validation.base_style=1", pictures)
    previews = ("preview.every=2", "preview.steps=1", "preview.count=1")
    options = ("dataset.resolution=32", "optimizer.lr=0.05", "adapter.targets=[double,single[0:1].attention:4]")
    run = command("train", *model, *short, *previews, *options, "name=mine")
    assert run.code == 0, run.err
    assert f"of {miniature.modules} projections" in run.out
    assert run.out.count("0 of") == 0
    assert Path("outputs/mine/export/mine.safetensors").is_file()
    assert Image.open("outputs/mine/previews/step-000002.png").width > 100
    small = ("height=32", "width=32", "steps=2", "prompts=[a red apple]")
    drawn = command("sample", *model, *small, "adapters=[outputs/mine]", "strengths=[0,1]", "output=out")
    assert drawn.code == 0, drawn.err
    base = command("sample", *model, *small, "output=base")
    assert base.code == 0, base.err
    with_adapter, without = (np.asarray(Image.open(f"{place}/0000.png")).astype(int) for place in ("out", "base"))
    assert np.abs(with_adapter - without).max() > 0


def test_an_adapter_of_klein_base_is_sampled_on_the_distilled_one(
    pictures: str, command: Command, tmp_path: Path
) -> None:
    MINIATURES["flux2_klein"].build(tmp_path / "model")
    base = ("model=flux2_klein_base_4b", "model.path=model", "dataset.resolution=32", pictures, "device=cpu")
    assert command("train", *base, "max_steps=1", "preview.every=0", "validation.every=0", "name=mine").code == 0
    distilled = ("model=flux2_klein_4b", "model.path=model", "height=32", "width=32", "device=cpu")
    drawn = command("sample", *distilled, "adapters=[outputs/mine]", "prompts=[cat]", "output=out")
    assert drawn.code == 0, drawn.err
    assert "2 of 2: mine x 1" in drawn.out


@pytest.mark.parametrize("kind", ["int8", "nf4", "bf16"])
def test_the_demo_learns_on_every_precision(kind: str, command: Command) -> None:
    run = command("train", *SHORT, f"precision={kind}", "name=mine")
    assert run.code == 0, run.err
    assert f"base in {kind}" in run.out
