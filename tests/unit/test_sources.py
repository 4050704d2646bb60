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
from huggingface_hub.errors import HfHubHTTPError
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


def opened(
    path: Path | str,
    family: str = "flux2_klein",
    components: Path | None = None,
    *,
    to_train: bool = False,
    **more: Any,
) -> Model:
    place = None if components is None else str(components)
    spec = ModelSpec(family=family, path=str(path), components=place, title="Mini", architecture_name="mini", **more)
    return open_model(spec, to_train=to_train)


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


@pytest.mark.parametrize(
    ("family", "what"),
    [
        ("flux2_small", "text_encoder holds Qwen3ForCausalLM"),
        ("flux2_dev", "text_encoder holds Qwen3ForCausalLM"),
        ("flux1", "lacks text_encoder_2/, tokenizer_2/"),
    ],
)
def test_each_family_refuses_the_folder_of_klein(folders: dict[str, Path], family: str, what: str) -> None:
    with refused(what):
        opened(folders["flux2_klein"], family)


def test_a_folder_with_a_transformer_alone_takes_the_rest_from_components(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["flux2_klein"] / "transformer", tmp_path / "tuned" / "transformer")
    model = opened(tmp_path / "tuned", components=folders["flux2_klein"])
    assert model.files.transformer == tmp_path / "tuned" / "transformer"
    assert model.files.components == folders["flux2_klein"]
    with refused("lacks vae/, text_encoder/, tokenizer/"):
        opened(tmp_path / "tuned")


@pytest.mark.parametrize("change", [{"future_option": 1}, {"quantization_config": None}])
def test_a_configuration_of_another_version_is_read_as_far_as_it_is_known(klein: Path, change: dict[str, Any]) -> None:
    config = klein / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    assert opened(klein)


def test_a_configuration_that_builds_nothing_is_named(klein: Path) -> None:
    config = klein / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_layers": "two"}))
    with refused("transformer/config.json builds no Flux2Transformer2DModel"):
        opened(klein)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda tensors: tensors.pop("bn.running_mean"), "1 missing (bn.running_mean)"),
        (lambda tensors: tensors.update({"decoder.conv_out.bias": torch.ones(7)}), "1 mis-shaped (decoder.conv_out"),
    ],
)
def test_tensors_of_the_vae_that_do_not_fit_are_named(klein: Path, change: Callable[[Any], Any], what: str) -> None:
    path = klein / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with refused(what):
        opened(klein)


def test_a_pickle_beside_the_vae_is_not_opened(klein: Path) -> None:
    path = klein / "vae" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".fp16.safetensors"))
    path.with_suffix(".bin").write_bytes(b"\x80\x04K\x00.")
    assert opened(klein).load_vae(torch.device("cpu"))


def test_a_text_encoder_with_too_few_layers_is_refused(klein: Path) -> None:
    config = klein / "text_encoder" / "config.json"
    content = json.loads(config.read_text())
    content |= {"num_hidden_layers": 20, "layer_types": ["full_attention"] * 20}
    config.write_text(json.dumps(content))
    with refused("has 20 layers, and this family reads its states after layer 27"):
        opened(klein)


def test_an_empty_tokenizer_folder_is_named(klein: Path) -> None:
    shutil.rmtree(klein / "tokenizer")
    (klein / "tokenizer").mkdir()
    with refused(f"{klein}/tokenizer holds no tokenizer"):
        opened(klein)


def test_a_file_that_has_lost_a_block_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    whole = load_file(folders["flux2_klein"] / "transformer" / "diffusion_pytorch_model.safetensors")
    cut = {key: tensor for key, tensor in whole.items() if not key.startswith("single_transformer_blocks.1.")}
    save_file(cut, tmp_path / "cut.safetensors")
    with refused("holds 1 single blocks, its model has 2"):
        opened(tmp_path / "cut.safetensors", components=folders["flux2_klein"])


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
    assert opened(klein, to_train=True)
    index.write_text(json.dumps({**json.loads(index.read_text()), "is_distilled": True}))
    with refused("is distilled to a few steps", "model.train_distilled=true"):
        opened(klein, to_train=True)
    assert opened(klein)
    assert opened(klein, to_train=True, train_distilled=True)


def test_what_needs_no_download_is_refused_before_one(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    def fetch(*_: object, **__: object) -> None:
        raise AssertionError("nothing should be fetched")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert "is distilled" in command("train", "model=flux2_klein_4b").err
    real = ("model=flux2_klein_base_4b", "device=cpu")
    assert "did you mean attention?" in command("train", *real, "adapter.targets=[atention]").err
    assert "dataset.folder=nowhere" in command("train", *real, "dataset.folder=nowhere").err
    assert "resume=nowhere" in command("train", *real, "resume=nowhere").err
    assert "outputs/none" in command("sample", *real, "adapters=[outputs/none]").err
    assert "outputs/none" in command("edit", *real, "adapters=[outputs/none]").err


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


@pytest.mark.parametrize("error", [RuntimeError("CAS: closed\nmore"), HfHubHTTPError.__bases__[0]("x")])
def test_a_download_that_breaks_off_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fetch(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with refused("the download broke off", "goes on with it"):
        opened("black-forest-labs/FLUX.2-klein-base-4B")


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
