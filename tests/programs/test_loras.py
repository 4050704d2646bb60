"""export, inspect and merge on the adapter of a short run, and a run made again from its file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flux2_lora.lora_files import read_any
from flux2_lora.publish.run_card import read_card
from tests.conftest import Command

QUICK = ("steps=2", "device=cpu", "prompts=[red apple]")


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run whose adapter is large enough to be seen."""
    folder = tmp_path / "outputs" / "short"
    shutil.copytree(trained, folder)
    file = folder / "checkpoints/step-000004/adapter.safetensors"
    strong = {key: 30 * tensor if "lora_B" in key else tensor for key, tensor in load_file(file).items()}
    with safe_open(file, framework="pt") as opened:
        save_file(strong, file, opened.metadata())
    return folder


def drawn(command: Command, place: str, output: str, *options: str) -> np.ndarray:
    made = command("sample", *QUICK, f"adapters=[{place}]", f"output={output}", *options)
    assert made.code == 0, made.err
    with Image.open(f"{output}/0000.png") as picture:
        return np.asarray(picture).astype(int)


def test_every_format_draws_the_same_picture(run: Path, command: Command) -> None:
    exported = command("export", f"adapter={run}", "formats=[universal,comfyui,diffusers,peft]")
    assert exported.code == 0, exported.err
    expected = drawn(command, str(run), "expected")
    base = drawn(command, str(run), "base", "strengths=[0]")
    assert np.abs(expected - base).max() > 5
    for suffix in ("", "-comfyui", "-diffusers", "-peft"):
        found = drawn(command, f"{run}/export/short{suffix}.safetensors", f"drawn{suffix}")
        assert np.abs(found - expected).max() <= 1, suffix


def test_the_proof_lies_beside_the_file(run: Path, command: Command) -> None:
    exported = command("export", f"adapter={run}", "dtype=bf16")
    assert "ComfyUI    32 of 32" in exported.out
    proof = json.loads((run / "export/short.proof.json").read_text())
    assert [(c["client"], c["matched"], c["total"]) for c in proof["clients"]] == [
        (name, 32, 32) for name in ("ComfyUI", "Forge Neo", "Diffusers", "InvokeAI")
    ]


def test_a_file_is_looked_into(run: Path, command: Command) -> None:
    assert command("export", f"adapter={run}").code == 0
    seen = command("inspect", f"{run}/export/short.safetensors", "output=norms.png")
    assert seen.code == 0, seen.err
    for words in (
        "kohya names",
        "flux2-lora tiny, 256 wide",
        "rank      16, scale 1",
        "32 Linears",
        "norm      double",
    ):
        assert words in seen.out
    assert "InvokeAI   32 of 32" in seen.out
    assert "run card  step 4, 28 pictures" in seen.out
    with Image.open("norms.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 16) or []) > 3


def test_a_file_that_clients_drop_is_shown_as_such(run: Path, command: Command) -> None:
    raw = load_file(run / "checkpoints/step-000004/adapter.safetensors")
    save_file({f"base_model.model.{key}": tensor for key, tensor in raw.items()}, "raw.safetensors")
    seen = command("inspect", "raw.safetensors")
    assert "ComfyUI    0 of 32" in seen.out
    assert "Diffusers  32 of 32" in seen.out


def test_merged_adapters_are_the_sum(run: Path, command: Command) -> None:
    merged = command("merge", f"adapters=[{run},{run}]", "weights=[1,0.5]", "dtype=fp32", "output=both.safetensors")
    assert merged.code == 0, merged.err
    expected = drawn(command, str(run), "expected", "strengths=[1.5]")
    assert np.abs(drawn(command, "both.safetensors", "drawn") - expected).max() <= 1


def test_a_base_with_an_adapter_folded_in_draws_what_both_draw(run: Path, command: Command, tiny: Path) -> None:
    merged = command("merge", f"adapters=[{run}]", "base=true", "dtype=fp32", "output=model.safetensors")
    assert merged.code == 0, merged.err
    expected = drawn(command, str(run), "expected", "precision=fp32")
    model = ("model.path=model.safetensors", f"model.components={tiny}", "precision=fp32")
    made = command("sample", *QUICK, *model, "output=drawn")
    assert made.code == 0, made.err
    with Image.open("drawn/0000.png") as picture:
        assert np.abs(np.asarray(picture).astype(int) - expected).max() <= 2


def test_what_is_left_in_quantised_hosts_is_told_by_block(run: Path, command: Command) -> None:
    told = command("export", f"adapter={run}", "hosts=[fp8,int8]")
    assert told.code == 0, told.err
    assert all(
        f"{stack} {number}" in told.out for stack, count in (("double", 2), ("single", 4)) for number in range(count)
    )
    assert "fp8: merged, rounding adds noise" in told.out


def test_a_run_is_made_again_from_its_file_bit_for_bit(run: Path, command: Command) -> None:
    again = command("train", "from=outputs/short/export/short.safetensors", "name=again", "preview.every=0")
    assert again.code == 0, again.err
    assert "pictures and captions are those of the run made again" in again.out
    first, second = (
        load_file(path) for path in (run / "export/short.safetensors", Path("outputs/again/export/again.safetensors"))
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_other_pictures_are_told_when_a_run_is_made_again(run: Path, command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    shutil.copytree("outputs/short/previews/training", folder)
    other = (f"dataset.folder={folder}", "dataset.default_caption=a face", "dataset.max_upscale=8")
    short = ("max_steps=1", "preview.every=0", "validation.every=0", "name=again")
    again = command("train", "from=outputs/short/export/short.safetensors", *other, *short)
    assert again.code == 0, again.err
    assert "of the 28 pictures of then are not here" in again.out


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (("formats=[komfy]",), "no export format"),
        (("hosts=[fp9]",), "no way to store a model"),
        (("adapter=nowhere",), "holds no adapter"),
    ],
)
def test_what_cannot_be_exported_is_refused(options: tuple[str, ...], what: str, command: Command) -> None:
    refused = command("export", *options)
    assert (refused.code, what in refused.err) == (2, True)


def test_a_foreign_file_is_converted_without_a_run(run: Path, command: Command) -> None:
    assert command("export", f"adapter={run}", "formats=[comfyui]", "output=foreign.safetensors").code == 0
    made = command("export", "adapter=foreign.safetensors", "output=universal.safetensors")
    assert made.code == 0, made.err
    assert read_any("universal.safetensors").naming == "kohya"
    assert read_card(Path("universal.safetensors")).step == 4
