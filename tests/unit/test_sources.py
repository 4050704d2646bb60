"""Where a model may lie, and what is said of everything that is no model; within two seconds, nothing loaded."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from flux2_lora.errors import UserError
from flux2_lora.families import Model, ModelSpec, open_model
from tests.conftest import Command
from tests.miniatures import MINIATURES


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp(name) for name in ("flux2_klein", "flux1", "flux2_small", "flux2_dev")}
    for name, folder in made.items():
        MINIATURES[name].build(folder)
    return made


@pytest.fixture
def klein(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(folders["flux2_klein"], tmp_path / "klein"))


def opened(path: Path | str, family: str = "flux2_klein", components: Path | None = None, **more: Any) -> Model:
    place = None if components is None else str(components)
    spec = ModelSpec(family=family, path=str(path), components=place, title="Mini", architecture_name="mini", **more)
    return open_model(spec)


@contextmanager
def refused(what: str, remedy: str = "") -> Iterator[None]:
    """UserError of one line and one line, in under two seconds, with nothing read but headers."""
    began = time.perf_counter()
    with pytest.raises(UserError) as error:
        yield
    assert time.perf_counter() - began < 2
    assert what in error.value.what
    assert remedy in error.value.remedy
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize("other", ["flux1", "flux2_small", "flux2_dev"])
def test_a_folder_of_another_family_is_refused(folders: dict[str, Path], other: str) -> None:
    with refused("of the family flux2_klein", "model="):
        opened(folders[other])


@pytest.mark.parametrize("family", ["flux2_small", "flux1", "flux2_dev"])
def test_each_family_refuses_the_folder_of_klein(folders: dict[str, Path], family: str) -> None:
    with refused(""):
        opened(folders["flux2_klein"], family)


def test_a_transformer_file_of_another_architecture_is_named(folders: dict[str, Path]) -> None:
    file = folders["flux1"] / "transformer" / "diffusion_pytorch_model.safetensors"
    with refused("is a FLUX.1 transformer, not a FLUX.2 transformer", "model="):
        opened(file, components=folders["flux2_klein"])


@pytest.mark.parametrize(("part", "what"), [("vae", "is a VAE"), ("text_encoder", "is a text encoder")])
def test_another_part_of_the_model_is_named(folders: dict[str, Path], part: str, what: str) -> None:
    file = next((folders["flux2_klein"] / part).glob("*.safetensors"))
    with refused(what, "the transformer"):
        opened(file, components=folders["flux2_klein"])


@pytest.mark.parametrize(
    "key",
    [
        "diffusion_model.double_blocks.0.img_attn.proj.lora_A.weight",
        "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight",
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight",
    ],
)
def test_a_lora_where_a_transformer_is_due_is_named(folders: dict[str, Path], key: str, tmp_path: Path) -> None:
    save_file({key: torch.ones(2, 2)}, tmp_path / "style.safetensors")
    with refused("is a LoRA", "the transformer"):
        opened(tmp_path / "style.safetensors", components=folders["flux2_klein"])


def test_one_file_needs_its_components(folders: dict[str, Path]) -> None:
    file = folders["flux2_klein"] / "transformer" / "diffusion_pytorch_model.safetensors"
    with refused("is one file", "model.components="):
        opened(file)
    assert opened(file, components=folders["flux2_klein"]).weights.shapes


def test_a_text_encoder_of_the_wrong_width_is_refused_with_both(klein: Path) -> None:
    config = klein / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_size": 40}))
    with refused("gives embeddings of 120 channels, the transformer reads 96", "model.components"):
        opened(klein)


def test_a_distilled_base_is_refused_for_training_unless_forced(klein: Path) -> None:
    index = klein / "model_index.json"
    assert opened(klein).refuse_distilled() is None
    index.write_text(json.dumps({**json.loads(index.read_text()), "is_distilled": True}))
    with refused("is distilled to a few steps", "model.train_distilled=true"):
        opened(klein).refuse_distilled()
    with refused("is distilled to a few steps"):
        opened(klein, distilled=True).refuse_distilled()
    opened(klein, train_distilled=True).refuse_distilled()


def test_train_refuses_the_distilled_klein_and_sample_takes_it(klein: Path, command: Command) -> None:
    outcome = command("train", "model=flux2_klein_4b", f"model.path={klein}", "device=cpu")
    assert outcome.code == 2
    assert "Flux.2 Klein 4B is distilled to a few steps" in outcome.err
    assert not Path("outputs").exists()
    size = ("height=32", "width=32", "steps=1", "prompts=[cat]", "device=cpu", "output=out")
    assert command("sample", "model=flux2_klein_4b", f"model.path={klein}", *size).code == 0


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
@pytest.mark.parametrize("damage", [_cut, lambda path: path.write_bytes(b"<html>not found</html>"), Path.unlink])
def test_damaged_weights_of_any_part_are_named(klein: Path, part: str, damage: Callable[[Path], Any]) -> None:
    damage(next((klein / part).glob("*.safetensors")))
    with refused(f"{klein}/{part}"):
        opened(klein)


def test_a_damaged_configuration_is_named(klein: Path) -> None:
    (klein / "transformer" / "config.json").write_text("{")
    with refused("transformer/config.json cannot be read as JSON"):
        opened(klein)


def test_a_folder_that_another_program_quantised_is_refused_by_its_method(klein: Path) -> None:
    config = klein / "transformer" / "config.json"
    content = {**json.loads(config.read_text()), "quantization_config": {"quant_method": "bitsandbytes"}}
    config.write_text(json.dumps(content))
    with refused("is quantised by bitsandbytes", "the original weights"):
        opened(klein)


def test_weights_that_do_not_fit_their_configuration_are_named(klein: Path) -> None:
    path = klein / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["proj_out.weight"] = torch.ones(5, 256)
    del tensors["x_embedder.weight"]
    save_file(tensors, path)
    with refused("1 missing (x_embedder.weight); 1 mis-shaped (proj_out.weight [5, 256] for [128, 256])"):
        opened(klein)


def test_a_fill_model_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    fill = Path(shutil.copytree(folders["flux1"], tmp_path / "fill"))
    path = fill / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["x_embedder.weight"] = torch.ones(256, 384)
    save_file(tensors, path)
    with refused("takes 384 channels where the family's latents have 64: a Fill or Control model"):
        opened(fill, "flux1")


@pytest.mark.parametrize("place", ["no/such/folder/at/all", "nowhere", "~/nowhere"])
def test_a_path_that_is_nothing_is_refused(place: str) -> None:
    with refused(f"model.path={place} does not exist", "hub id (owner/name)"):
        opened(place)


def test_a_hub_id_is_found_in_the_cache_while_offline(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--someone--klein"
    shutil.copytree(folders["flux2_klein"], repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert opened("someone/klein").files.components == repository / "snapshots" / "abc"
    file = folders["flux2_klein"] / "transformer" / "diffusion_pytorch_model.safetensors"
    assert opened(file, components="someone/klein").files.transformer == file  # type: ignore[arg-type]
    with refused(
        "model.path=someone/else is no folder or file here, and it is not in the hub's cache", "HF_HUB_OFFLINE"
    ):
        opened("someone/else")


@pytest.mark.parametrize(
    ("name", "what", "remedy"),
    [
        ("GatedRepoError", "is gated", "hf auth login"),
        ("RepositoryNotFoundError", "the hub has no such model", "spelling"),
        ("HfHubHTTPError", "the hub answers: 503", "later"),
    ],
)
def test_what_the_hub_refuses_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str, what: str, remedy: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        response: Any = SimpleNamespace(headers={}, request=None, status_code=503)
        raise getattr(huggingface_hub.errors, name)("503\nand more", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with refused(what, remedy):
        opened("black-forest-labs/FLUX.2-dev")


def test_only_the_parts_that_are_needed_are_fetched(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fetch(_: str, *, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(folders["flux2_klein"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    opened("black-forest-labs/FLUX.2-klein-base-4B")
    assert {pattern.split("/")[0] for pattern in asked} == {
        *("model_index.json", "transformer", "vae", "text_encoder", "tokenizer")
    }
    assert not [pattern for pattern in asked if pattern.endswith((".bin", ".pt", ".ckpt", "*"))]
