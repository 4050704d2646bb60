"""Text encoders layer by layer: every layer is read once, one is in memory at a time, and the texts do not mix."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flux2_lora.conditioning import stack
from flux2_lora.errors import UserError
from flux2_lora.families import Model, ModelSpec, open_model
from flux2_lora.networks import text
from flux2_lora.weights import Stored, Weights
from tests.miniatures import MINIATURES

CPU = torch.device("cpu")
TEXTS = ["a red apple", "blue", "cat face in photo style", "", "an image of a cat", "red"]


@pytest.fixture(scope="module", params=["flux2_small", "flux2_klein", "flux2_dev", "flux1"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp(request.param)
    miniature = MINIATURES[request.param]
    miniature.build(folder)
    return open_model(ModelSpec(family=miniature.family, path=str(folder), title="", architecture_name=""))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each tensor is read, by its name below the prefix of its file."""
    counted: Counter[str] = Counter()
    original = Weights.read

    def read(self: Weights, name: str) -> Stored:
        counted[f"{self.source.name}/{name}"] += 1
        return original(self, name)

    monkeypatch.setattr(Weights, "read", read)
    return counted


def test_every_tensor_is_read_once_for_all_texts(model: Model, reads: Counter[str]) -> None:
    encode = model.load_prompt_encoder(CPU)
    assert len(list(encode(TEXTS))) == len(TEXTS)
    assert set(reads.values()) == {1}
    assert any("layers.0." in name or "block.0." in name for name in reads)


@pytest.mark.parametrize(("name", "highest", "layers"), [("flux2_klein", 27, 29), ("flux2_dev", 30, 31)])
def test_layers_above_the_highest_that_is_asked_for_are_not_read(
    name: str, highest: int, layers: int, reads: Counter[str], tmp_path: Path
) -> None:
    MINIATURES[name].build(tmp_path)
    opened = open_model(ModelSpec(family=name, path=str(tmp_path), title="", architecture_name=""))
    list(opened.load_prompt_encoder(CPU)(["a cat"]))
    numbers = {int(key.split("layers.")[1].split(".")[0]) for key in reads if "layers." in key}
    assert numbers == set(range(highest))
    assert layers > highest


def test_one_layer_at_a_time_has_weights(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    together: list[int] = []
    original = text.LayerByLayer.__init__

    def watched(self: text.LayerByLayer, network: nn.Module, *args: object, **kwargs: object) -> None:
        original(self, network, *args, **kwargs)  # type: ignore[arg-type]
        layers = next(m for m in network.modules() if isinstance(m, nn.ModuleList))
        for layer in layers:
            layer.register_forward_hook(lambda *_: together.append(sum(map(has_weights, layers))))

    monkeypatch.setattr(text.LayerByLayer, "__init__", watched)
    list(model.load_prompt_encoder(CPU)(TEXTS))
    assert set(together) == {0}, "a layer gives its weights back before the next one runs"


def has_weights(layer: nn.Module) -> bool:
    return any(not parameter.is_meta for parameter in layer.parameters())


def test_a_text_is_embedded_alike_alone_and_among_others(model: Model) -> None:
    encode = model.load_prompt_encoder(CPU)
    together = list(encode(TEXTS))
    for one, among in zip(TEXTS, together, strict=True):
        alone = next(iter(encode([one])))
        torch.testing.assert_close(alone.embeds, among.embeds, atol=1e-5, rtol=1e-5)
        if among.pooled is not None and alone.pooled is not None:
            torch.testing.assert_close(alone.pooled, among.pooled, atol=1e-5, rtol=1e-5)


def test_waves_change_nothing(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = stack(list(model.load_prompt_encoder(CPU)(TEXTS)))
    monkeypatch.setattr(text, "WAVE_BYTES", 1)
    each = stack(list(model.load_prompt_encoder(CPU)(TEXTS)))
    torch.testing.assert_close(each.embeds, whole.embeds, atol=1e-5, rtol=1e-5)


def test_of_the_embedding_only_the_rows_of_the_tokens_are_read(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    original = Weights.rows

    def rows(self: Weights, name: str, indices: Tensor) -> Tensor:
        asked.append(len(indices))
        return original(self, name, indices)

    monkeypatch.setattr(Weights, "rows", rows)
    list(model.load_prompt_encoder(CPU)(["a a a"]))
    # Tokens of three words, of a template or of an end mark; CLIP has a row for each of its 77 positions besides.
    assert asked
    assert all(count < 40 or count == 77 for count in asked)


def test_a_length_of_the_users_own_is_padded_and_cut_to(model: Model) -> None:
    encode = model.family.text.load(model.files.components, CPU, 8)
    assert [one.embeds.shape[1] for one in encode(["a", "a red apple in photo style of a cat face in an image"])] == [
        8,
        8,
    ]


def test_a_missing_tensor_of_the_text_encoder_is_named(tmp_path: Path) -> None:
    MINIATURES["flux2_klein"].build(tmp_path / "whole")
    folder = Path(shutil.copytree(tmp_path / "whole", tmp_path / "damaged"))
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 missing \(layers\.3\.mlp\.up_proj\.weight\)"):
        open_model(ModelSpec(family="flux2_klein", path=str(folder), title="", architecture_name=""))


@pytest.mark.parametrize("kept", [True, False])
def test_a_chat_template_in_a_file_of_its_own_is_found(kept: bool, tmp_path: Path) -> None:  # noqa: FBT001
    MINIATURES["flux2_dev"].build(tmp_path)
    model = open_model(ModelSpec(family="flux2_dev", path=str(tmp_path), title="", architecture_name=""))
    before = next(iter(model.load_prompt_encoder(CPU)(["a cat"]))).embeds
    template = tmp_path / "tokenizer" / "chat_template.jinja"
    if kept:
        content = json.dumps({"chat_template": template.read_text()})
        (tmp_path / "tokenizer" / "chat_template.json").write_text(content)
    template.unlink()
    if kept:
        assert torch.equal(next(iter(model.load_prompt_encoder(CPU)(["a cat"]))).embeds, before)
    else:
        with pytest.raises(UserError, match="has no chat template"):
            model.load_prompt_encoder(CPU)
