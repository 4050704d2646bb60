"""sample, edit, export, prepare and inspect on the bundled model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from flux2_lora.bundled import share
from flux2_lora.inference.pack import read_settings
from flux2_lora.samplers import Filling
from tests.conftest import Command

QUICK = ("steps=2", "device=cpu")
FACE = share() / "data/demo/validation/grinning-face.png"


def pixels(path: Path | str) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_sample_writes_a_picture_a_prompt_and_a_grid(command: Command) -> None:
    assert command("sample", *QUICK, "prompts=[red apple, cat face]").code == 0
    pack = ["with_diffusers.py", "workflow.api.json", "workflow.json"]
    written = sorted(path.name for path in Path("outputs/sample").iterdir())
    assert written == ["0000.png", "0001.png", "grid.png", *pack]
    settings = read_settings(Path("outputs/sample/0001.png"))
    assert (settings.prompt, settings.steps, settings.height, settings.cfg_scale) == ("cat face", 2, 128, 3.0)
    assert pixels("outputs/sample/0000.png").shape == (128, 128, 3)


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
        original = np.asarray(face.convert("RGB")).astype(int)
    far = {}
    for strength in (0.2, 1.0):
        options = ("steps=10", f"image={FACE}", f"strength={strength}", "prompts=[red heart]")
        assert command("sample", *options, f"output=at{strength}").code == 0
        assert_whole_pack(Path(f"at{strength}"))
        far[strength] = np.abs(pixels(f"at{strength}/0000.png") - original).mean()
    assert far[0.2] < far[1.0]


def assert_whole_pack(folder: Path, *roles: str, pictures: int = 1) -> None:
    """Workflow, script and what they load are there, and nothing else is in inputs."""
    settings = read_settings(folder / "0000.png")
    assert settings.inputs is not None
    needed = {settings.inputs.file(role) for role in settings.input_roles}
    assert needed == {settings.inputs.file(role) for role in ("picture", *roles)}
    there = {file.name for file in (folder / "inputs").iterdir()}
    assert needed <= there
    assert len(there) == pictures * len(needed)
    assert settings.inputs.key in (folder / "workflow.json").read_text()
    assert all(name in (folder / "with_diffusers.py").read_text() for name in there)
    with Image.open(folder / "0000.png") as saved:
        assert json.loads(saved.info["prompt"]) == json.loads((folder / "workflow.api.json").read_text())


@pytest.mark.parametrize("feather", [0, 8])
def test_inpaint_gives_the_kept_region_back_untouched_and_paints_the_rest(command: Command, feather: int) -> None:
    mask = Image.new("L", (128, 128), 0)
    ImageDraw.Draw(mask).rectangle((40, 40, 90, 90), fill=255)
    mask.save("mask.png")
    assert command("edit", *QUICK, f"image={FACE}", "mask=mask.png", f"feather_px={feather}").code == 0
    assert_whole_pack(Path("outputs/edit"), "original", "mask", "latent-mask", "original-mask")
    assert Path("outputs/edit/seams.py").is_file()
    kept = np.asarray(mask) == 0
    before, after = pixels(FACE), pixels("outputs/edit/0000.png")
    assert np.array_equal(after[kept], before[kept])
    assert (after[~kept] != before[~kept]).any()


def test_outpaint_grows_by_the_pixels_asked_for_and_keeps_the_picture(command: Command) -> None:
    assert command("edit", *QUICK, f"image={FACE}", "outpaint.right=20", "outpaint.top=12").code == 0
    after = pixels("outputs/edit/0000.png")
    assert after.shape == (140, 148, 3)
    assert np.array_equal(after[12:, :128], pixels(FACE))


def test_a_ratio_is_reached_and_the_picture_kept(command: Command) -> None:
    assert command("edit", *QUICK, f"image={FACE}", "ratio=1:1", "output=same").code == 0
    assert np.array_equal(pixels("same/0000.png"), pixels(FACE))
    assert command("edit", *QUICK, f"image={FACE}", "ratio=3:2").code == 0
    after = pixels("outputs/edit/0000.png")
    assert after.shape == (128, 192, 3)
    assert np.array_equal(after[:, 32:160], pixels(FACE))


@pytest.mark.parametrize(
    ("option", "fill"),
    [("fill.resample=3", Filling(resample=3)), ("fill.reconstruction=true", Filling(reconstruction=True))],
)
def test_what_is_filled_our_way_is_drawn_anew_and_has_no_workflow(command: Command, option: str, fill: Filling) -> None:
    ImageDraw.Draw(mask := Image.new("L", (128, 128), 0)).rectangle((40, 40, 90, 90), fill=255)
    mask.save("mask.png")
    drawn = []
    for options in ([], [option]):
        outcome = command("edit", "steps=3", "device=cpu", f"image={FACE}", "mask=mask.png", *options)
        assert outcome.code == 0
        drawn.append(np.asarray(Image.open("outputs/edit/0000.png")))
    assert "fill is of this program alone" in outcome.out
    settings = read_settings(Path("outputs/edit/0000.png"))
    assert settings is not None
    assert settings.fill == fill
    assert not [*Path("outputs/edit").glob("*.json"), *Path("outputs/edit").glob("*.py")]
    assert "workflow" not in Image.open("outputs/edit/0000.png").info
    kept = np.asarray(mask) == 0
    assert np.array_equal(drawn[0][kept], drawn[1][kept])
    assert not np.array_equal(drawn[0][~kept], drawn[1][~kept])


def test_a_fill_without_a_mask_is_said(command: Command) -> None:
    outcome = command("edit", *QUICK, f"image={FACE}", "fill.resample=3")
    assert outcome.code == 0
    assert "fill is of masks and borders: there is none here" in outcome.out
    assert Path("outputs/edit/workflow.json").is_file()


def test_a_mask_of_another_size_is_resized_and_that_is_said_once(command: Command) -> None:
    mask = Image.new("L", (16, 16), 0)
    ImageDraw.Draw(mask).rectangle((0, 0, 7, 15), fill=255)
    mask.save("mask.png")
    outcome = command("edit", *QUICK, f"image={FACE}", "mask=mask.png", "strengths=[0.5,1]")
    assert outcome.code == 0
    assert outcome.out.count("16 x 16 px, is resized to 128 x 128") == 1
    assert np.array_equal(pixels("outputs/edit/0000.png")[:, 80:], pixels(FACE)[:, 80:])


def test_an_empty_mask_gives_the_picture_back(command: Command) -> None:
    Image.new("L", (128, 128)).save("mask.png")
    outcome = command("edit", *QUICK, f"image={FACE}", "mask=mask.png")
    assert outcome.code == 0
    assert "the mask is empty" in outcome.out
    assert not Path("outputs/edit/workflow.json").exists()
    assert np.array_equal(pixels("outputs/edit/0000.png"), pixels(FACE))


def test_what_is_transparent_is_painted(command: Command) -> None:
    with Image.open(FACE) as face:
        erased = face.convert("RGBA")
    erased.paste((0, 0, 0, 0), (0, 0, 64, 128))
    erased.save("erased.png")
    assert command("edit", *QUICK, "image=erased.png").code == 0
    after = pixels("outputs/edit/0000.png")
    assert np.array_equal(after[:, 64:], pixels(FACE)[:, 64:])
    assert after[:, :64].max() > 0


def test_upscale_enlarges_in_tiles(command: Command) -> None:
    assert command("edit", *QUICK, f"image={FACE}", "upscale=1.5").code == 0
    assert pixels("outputs/edit/0000.png").shape == (192, 192, 3)
    assert_whole_pack(Path("outputs/edit"))
    assert Path("outputs/edit/tiles.py").is_file()


def test_a_drawn_picture_is_enlarged_and_refined(command: Command) -> None:
    for name, upscale in {"small": 1, "large": 2}.items():
        options = ("prompts=[red apple, cat face]", f"upscale={upscale}", f"output={name}", "steps=6")
        assert command("sample", *options).code == 0
    with Image.open("large/0000.png") as large:
        assert large.size == (256, 256)
        shrunk = np.asarray(large.resize((128, 128), Image.Resampling.BOX)).astype(int)
    assert np.abs(shrunk - pixels("small/0000.png")).mean() < 25  # the same picture
    assert read_settings(Path("large/0000.png")).mode == "upscale"
    assert_whole_pack(Path("large"), pictures=2)


def test_sides_are_rounded_to_whole_tokens_and_that_is_said_once(command: Command) -> None:
    outcome = command("sample", *QUICK, "prompts=[red apple, cat face]", "height=70", "width=95")
    assert outcome.code == 0
    assert outcome.out.count("95 x 70 px is rounded to 80 x 64") == 1
    assert pixels("outputs/sample/0001.png").shape == (64, 80, 3)


def test_adapters_are_drawn_alone_and_together(command: Command, trained: Path) -> None:
    twice = f"adapters=[{trained},{trained}]"
    for name, options in {
        "alone": [twice, "strengths=[40]"],
        "halves": [twice, "strengths=[40]", "weights=[0.25,0.75]", "together=true"],
        "merged": [f"adapters=[{trained}]", "strengths=[40]", "merged=true"],
        "blocks": [f"adapters=[{trained}]", "strengths=[40]", "blocks=[double]"],
        "base": [f"adapters=[{trained}]", "strengths=[0]"],
    }.items():
        outcome = command("sample", *QUICK, "prompts=[red apple]", f"output={name}", *options)
        assert outcome.code == 0, outcome.err
        assert ("32 of 32 modules" in outcome.out) == (name != "blocks")
    others = ("halves", "merged", "base")
    far = {name: np.abs(pixels("alone/0000.png") - pixels(f"{name}/0000.png")) for name in others}
    assert far["halves"].max() <= 2
    assert far["merged"].mean() < far["base"].mean() / 4  # quantised again
    assert np.abs(pixels("alone/0000.png") - pixels("blocks/0000.png")).max() > 2
    [(part, strength)] = read_settings(Path("blocks/0000.png")).adapters
    assert (part, strength) == ("0-short-double.safetensors", 40)  # the file that holds no other blocks
    assert part in Path("blocks/workflow.json").read_text()
    assert Path("blocks/adapters", part).is_file()
    assert read_settings(Path("halves/0000.png")).adapters == (("short.safetensors", 10), ("short.safetensors", 30))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["strength=1.5", f"image={FACE}"], "strength=1.5 is out of range"),
        (["image=nowhere.png"], "image=nowhere.png does not exist"),
        ([f"references=[{FACE}]"], "looks at no reference pictures"),
        (["height=400000", "width=400000"], "400000 x 400000 px needs about"),
        (["weights=[1,2]"], "weights has 2 numbers for 0 adapters"),
        (["sampler=eular"], "sampler=eular is not a choice"),
    ],
)
def test_what_cannot_be_drawn_is_refused(command: Command, options: list[str], said: str) -> None:
    outcome = command("sample", *QUICK, "prompts=[red apple]", *options)
    assert outcome.code == 2
    assert said in outcome.err
    assert not Path("outputs/sample").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([f"image={FACE}", "ratio=wide"], "ratio=wide is no ratio"),
        ([f"image={FACE}", "ratio=-1:2"], "ratio=-1:2 is no ratio"),
        ([f"image={FACE}", "ratio=inf:1"], "ratio=inf:1 is no ratio"),
        ([f"image={FACE}", "ratio=2:1", "outpaint.left=8"], "ratio and outpaint both say"),
        ([f"image={FACE}", "upscale=2", "outpaint.left=8"], "upscale goes with no mask, border"),
        ([f"image={FACE}", "output=/proc/none"], "output=/proc/none cannot be written"),
        ([f"image={FACE}", "mask=nowhere.png"], "mask=nowhere.png does not exist"),
    ],
)
def test_an_edit_that_contradicts_itself_is_refused(command: Command, options: list[str], said: str) -> None:
    outcome = command("edit", *QUICK, *options)
    assert outcome.code == 2
    assert said in outcome.err


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
    assert len(entries) == 28 + 50
    stamps = {entry: entry.stat().st_mtime_ns for entry in entries}
    assert command("prepare").code == 0
    assert {entry: entry.stat().st_mtime_ns for entry in entries} == stamps
