"""sample, edit, export, prepare and inspect on the bundled model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from flux2_lora.bundled import share
from tests.conftest import Command

QUICK = ("steps=2", "device=cpu")
FACE = share() / "data/demo/validation/grinning-face.png"


def pixels(path: Path | str) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_sample_writes_a_picture_a_prompt_and_a_grid(command: Command) -> None:
    assert command("sample", *QUICK, "prompts=[red apple, cat face]").code == 0
    assert sorted(path.name for path in Path("outputs/sample").iterdir()) == ["0000.png", "0001.png", "grid.png"]
    assert pixels("outputs/sample/0000.png").shape == (64, 64, 3)


def test_an_adapter_at_strength_zero_draws_what_the_base_draws(command: Command, trained: Path) -> None:
    for name, options in {
        "base": [],
        "zero": [f"adapters=[{trained}]", "strengths=[0]"],
        "much": [f"adapters=[{trained}]", "strengths=[1,40]"],
    }.items():
        assert command("sample", *QUICK, "prompts=[red apple]", f"output={name}", *options).code == 0
    assert np.array_equal(pixels("base/0000.png"), pixels("zero/0000.png"))
    assert not np.array_equal(pixels("base/0000.png"), pixels("much/0000.png"))


def test_a_low_strength_of_image_to_image_stays_nearer_to_the_picture(command: Command) -> None:
    with Image.open(FACE) as face:
        original = np.asarray(face.convert("RGB").resize((64, 64))).astype(int)
    far = {}
    for strength in (0.2, 1.0):
        options = ("steps=10", f"image={FACE}", f"strength={strength}", "prompts=[red heart]")
        assert command("sample", *options, f"output=at{strength}").code == 0
        far[strength] = np.abs(pixels(f"at{strength}/0000.png") - original).mean()
    assert far[0.2] < far[1.0]


@pytest.mark.parametrize("feather", [0, 8])
def test_inpaint_gives_the_kept_region_back_untouched_and_paints_the_rest(command: Command, feather: int) -> None:
    mask = Image.new("L", (128, 128), 0)
    ImageDraw.Draw(mask).rectangle((40, 40, 90, 90), fill=255)
    mask.save("mask.png")
    assert command("edit", *QUICK, f"image={FACE}", "mask=mask.png", f"feather_px={feather}").code == 0
    kept = np.asarray(mask) == 0
    before, after = pixels(FACE), pixels("outputs/edit/0000.png")
    assert np.array_equal(after[kept], before[kept])
    assert (after[~kept] != before[~kept]).any()


def test_outpaint_grows_by_the_pixels_asked_for_and_keeps_the_picture(command: Command) -> None:
    assert command("edit", *QUICK, f"image={FACE}", "outpaint.right=20", "outpaint.top=12").code == 0
    after = pixels("outputs/edit/0000.png")
    assert after.shape == (140, 148, 3)
    assert np.array_equal(after[12:, :128], pixels(FACE))


def test_a_mask_of_another_size_is_refused(command: Command) -> None:
    Image.new("L", (10, 10)).save("mask.png")
    outcome = command("edit", f"image={FACE}", "mask=mask.png")
    assert outcome.code == 2
    assert "mask=mask.png is 10 x 10, the picture 128 x 128" in outcome.err


def test_export_proves_its_file_for_every_client(command: Command, trained: Path) -> None:
    outcome = command("export", f"adapter={trained}", "output=mine.safetensors")
    assert outcome.code == 0
    assert Path("mine.safetensors").is_file()
    for client in ("ComfyUI", "Forge Neo", "Diffusers", "InvokeAI"):
        assert client in outcome.out


def test_inspect_writes_a_contact_sheet_and_prepare_fills_the_cache(command: Command) -> None:
    assert command("inspect").code == 0
    assert Path("outputs/inspect.png").is_file()
    assert command("prepare").code == 0
    entries = list(Path("outputs/cache/latents").rglob("*.safetensors"))
    assert len(entries) == 28 + 48
    stamps = {entry: entry.stat().st_mtime_ns for entry in entries}
    assert command("prepare").code == 0
    assert {entry: entry.stat().st_mtime_ns for entry in entries} == stamps
