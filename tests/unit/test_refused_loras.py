"""LoRA files that are not wholly of the model, damaged or of another kind: refused with the cause."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flux2_lora.adapters import WEIGHTS, Adapter, save_adapter
from flux2_lora.errors import UserError
from flux2_lora.families import Model
from flux2_lora.lora_files import read_lora, read_loras
from tests.namings import AB, BY_WEIGHT, by_linear, by_weight, flux1_model, opened, written

QUERY = "transformer.transformer_blocks.0.attn.to_q"


@pytest.fixture
def flux1() -> Model:
    return flux1_model()


@pytest.fixture
def flux2(transformer: nn.Module) -> Model:
    return opened(transformer, "flux2_small")


def unet(tensors: dict[str, Tensor]) -> None:
    tensors.clear()
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = torch.ones(4, 640), torch.ones(640, 4)


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    def damage(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if old in key]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return damage


def with_key(key: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({key: tensor})


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (unet, r"is a LoRA of a UNet \(SDXL or SD 1.5\), the model is FLUX.2"),
        (renamed("ff.linear_in", "ff.net.0.proj"), "is a LoRA of FLUX.1, the model is FLUX.2"),
        (
            renamed("transformer_blocks.0.ff.", "layers.0.ff."),
            "names that no FLUX.2 .*, 2 of 17: .*layers.0.ff.linear_in",
        ),
        (renamed("single_transformer_blocks.1.", "single_transformer_blocks.9."), "does not have, 2 of 17:"),
        (
            with_key("double_blocks.0.img_attn.qkv.weight", torch.ones(2, 2)),
            "keys that no LoRA has, 1 of 35: .*qkv.weight",
        ),
        (with_key("text_encoder.layers.0.lora_A.weight", torch.ones(2, 2)), "changes text encoders too"),
        (with_key("lora_te1_layers_0.lora_down.weight", torch.ones(2, 2)), "changes text encoders too"),
        (with_key(f"{QUERY}.hada_w1_a", torch.ones(2, 2)), "holds LoHa in 1 of its 35 keys"),
        (with_key(f"{QUERY}.lokr_w1", torch.ones(2, 2)), "holds LoKr in 1 of its 35 keys"),
        (with_key(f"{QUERY}.dora_scale", torch.ones(2, 2)), "holds DoRA in 1 of its 35 keys"),
        (with_key(f"{QUERY}.lora_magnitude_vector", torch.ones(2)), "holds DoRA in 1 of its 35 keys"),
        (with_key(f"{QUERY}.diff_b", torch.ones(2)), "holds whole differences"),
        (with_key(f"{QUERY}.lora_B.bias", torch.ones(2)), "holds LoRA with biases"),
        (lambda tensors: tensors.pop(f"{QUERY}.lora_B.weight"), f"lacks A or B of {QUERY}"),
        (with_key("transformer.proj_out.alpha", torch.ones(())), "lacks A or B of transformer.proj_out"),
        (with_key(f"{QUERY}.lora_A.weight", torch.ones(3, 32)), f"no pair of matrices: {QUERY}"),
        (with_key(f"{QUERY}.lora_A.weight", torch.full((4, 32), torch.nan)), f"not finite in {QUERY}"),
        (with_key(f"{QUERY}.alpha", torch.tensor(torch.inf)), f"not finite in {QUERY}"),
        (with_key(f"{QUERY}.lora_down.weight", torch.ones(4, 32)), f"more than once what it does to {QUERY}"),
        (renamed("transformer.transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.to_q"), "more than once"),
        (lambda tensors: tensors.clear(), "changes nothing"),
    ],
)
def test_a_file_that_is_not_wholly_of_this_model_is_refused_with_its_cause(
    flux2: Model, tmp_path: Path, damage: Callable[[dict[str, Tensor]], object], text: str
) -> None:
    tensors, path = written(by_linear(flux2), lambda name: f"transformer.{name}", AB), tmp_path / "a.safetensors"
    damage(tensors)
    save_file(tensors, path)
    with pytest.raises(UserError, match=text):
        read_lora(str(path), flux2)


def kohya_of(model: Model, path: Path) -> str:
    _, spelled, halves, alpha = BY_WEIGHT[0]
    tensors = written(by_weight(model), spelled, halves, alpha)
    save_file({key: tensor for key, tensor in tensors.items() if "mod_lin" not in key}, path)
    return str(path)


def test_a_file_of_flux1_is_known_by_its_proportions_where_the_names_are_the_same(
    flux1: Model, flux2: Model, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"is a LoRA of FLUX.1, the model is FLUX.2"):
        read_lora(kohya_of(flux1, tmp_path / "1.safetensors"), flux2)
    with pytest.raises(UserError, match=r"is a LoRA of FLUX.2, the model is FLUX.1"):
        read_lora(kohya_of(flux2, tmp_path / "2.safetensors"), flux1)


def test_a_lora_of_another_size_is_refused_with_both_shapes(flux2: Model, tmp_path: Path) -> None:
    from tests.miniatures import flux2_transformer

    wider = opened(flux2_transformer(48, guidance=False), "flux2_small")
    with pytest.raises(UserError, match=r"of another size, 13 of 21 .*img_attn.qkv \[768 256\] for \[96 32\]") as error:
        read_lora(kohya_of(wider, tmp_path / "a.safetensors"), flux2)
    assert "klein 9B 4096" in error.value.remedy


def test_an_adapter_of_another_family_is_refused_by_name(flux2: Model, tmp_path: Path) -> None:
    other = Adapter(state={"x": torch.zeros(1)}, rank=4, alpha=4, targets=["mlp"], family="flux2_klein")
    save_adapter(tmp_path / WEIGHTS, other)
    with pytest.raises(UserError, match="of the family flux2_klein, the model is of flux2_small"):
        read_lora(str(tmp_path), flux2)


def test_a_truncated_file_and_a_pickle_are_refused(flux2: Model, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    kohya_of(flux2, path)
    path.write_bytes(path.read_bytes()[:-5])
    torch.save({"x": torch.ones(1)}, tmp_path / "a.pt")
    for place in (path, tmp_path / "a.pt"):
        with pytest.raises(UserError, match="is not a whole safetensors file"):
            read_lora(str(place), flux2)


@pytest.mark.parametrize("config", ["{", "[]", '{"lora_alpha": "much"}', '{"alpha_pattern": {"(": 1}}'])
def test_a_configuration_that_cannot_be_read_is_refused(flux2: Model, tmp_path: Path, config: str) -> None:
    path = tmp_path / "a.safetensors"
    tensors = written(by_linear(flux2), lambda name: f"transformer.{name}", AB)
    save_file(tensors, path, {"lora_adapter_metadata": config})
    with pytest.raises(UserError, match="configuration that cannot be read"):
        read_lora(str(path), flux2)


def test_blocks_that_leave_nothing_of_a_file_are_refused(flux2: Model, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    only = {m: p for m, p in by_linear(flux2).items() if m.startswith("single_transformer_blocks.0")}
    save_file(written(only, lambda name: f"transformer.{name}", AB), path)
    with pytest.raises(UserError, match=r"blocks=\[double\] leaves nothing"):
        read_loras([str(path)], flux2, ["double"])
    with pytest.raises(UserError, match=r"blocks names 'single\[7:\]'"):
        read_loras([str(path)], flux2, ["single[7:]"])
