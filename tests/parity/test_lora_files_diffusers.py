"""LoRA files that Diffusers and PEFT write: read to the updates that PEFT itself applies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import Flux2KleinPipeline
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from flux2_lora.families import Model, ModelSpec, load_family
from flux2_lora.lora_files import read_lora
from flux2_lora.networks.components import shapes_of
from flux2_lora.sources import ModelFiles
from flux2_lora.weights import Weights

TARGETS = ["to_q", "to_k", "to_out.0", "linear_in", "to_qkv_mlp_proj", "single_stream_modulation.linear"]
CONFIGS = [
    {"lora_alpha": 8},
    {"lora_alpha": 6, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"attn.to_q": 1, "0.ff.linear_in": 16}},
    {"lora_alpha": 8, "use_rslora": True},
]


def opened(transformer: nn.Module) -> Model:
    spec = ModelSpec(family="flux2_small", path="", title="small", architecture_name="small")
    files = ModelFiles(transformer=Path(), components=Path(), option="model.path")
    return Model(spec, load_family("flux2_small"), files, Weights(Path(), {}, shapes_of(transformer)))


@torch.no_grad()
def trained(transformer: nn.Module) -> dict[str, Tensor]:
    """Module -> the update that PEFT applies, after B was given values."""
    updates = {}
    for name, layer in transformer.named_modules():
        if isinstance(layer, LoraLayer):
            layer.lora_B["default"].weight.normal_()
            updates[name.removeprefix("base_model.model.")] = layer.get_delta_weight("default")
    return updates


def same(path: Path, model: Model, updates: dict[str, Tensor]) -> None:
    modules = read_lora(str(path), model).modules
    assert modules.keys() == updates.keys()
    for name, weights in modules.items():
        torch.testing.assert_close(weights.scale * weights.up @ weights.down, updates[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_file_of_diffusers_is_read_at_the_strength_it_was_trained_at(
    transformer: nn.Module, tmp_path: Path, config: dict[str, object]
) -> None:
    model = opened(transformer)
    transformer.add_adapter(LoraConfig(r=4, target_modules=TARGETS, **config))  # type: ignore[operator, arg-type]
    updates = trained(transformer)
    Flux2KleinPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),  # type: ignore[index, union-attr, operator]
    )
    same(tmp_path / "pytorch_lora_weights.safetensors", model, updates)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_folder_of_peft_is_read_with_its_configuration(
    transformer: nn.Module, tmp_path: Path, config: dict[str, object]
) -> None:
    model = opened(transformer)
    adapted = get_peft_model(transformer, LoraConfig(r=4, target_modules=TARGETS, **config))  # type: ignore[arg-type]
    updates = trained(adapted)
    adapted.save_pretrained(str(tmp_path))
    same(tmp_path / "adapter_model.safetensors", model, updates)
