"""What LoRAs do to a transformer: attached at strengths, merged into it, kept to some of its blocks."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flux2_lora.adapters import Lora, LoraWeights, attach_loras, lora_layers, merge_loras, set_strengths
from flux2_lora.conditioning import Conditioning
from flux2_lora.families import Model, ModelFamily
from flux2_lora.lora_files import read_loras
from flux2_lora.networks.transformers import block_linears
from flux2_lora.quantize import FrozenLinear
from flux2_lora.weights import Stored
from tests.conftest import quantised
from tests.namings import AB, RANK, by_linear, opened, written


@pytest.fixture
def flux2(transformer: nn.Module) -> Model:
    return opened(transformer, "flux2_small")


def velocity(family: ModelFamily, transformer: nn.Module) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 128, 2, 3, generator=rng)
    conditioning = Conditioning(embeds=torch.randn(2, 5, 24, generator=rng))
    with torch.no_grad():
        return family.velocity(transformer, latents, torch.tensor([0.3, 0.7]), conditioning)


def drawn_lora(model: Model, seed: int, rank: int = RANK) -> Lora:
    """A LoRA on every Linear of the table, at a scale of 0.5."""
    modules = {
        module: LoraWeights(down=down[:rank] + 0.01 * seed, up=up[:, :rank], scale=0.5)
        for module, (down, up) in by_linear(model).items()
    }
    return Lora(modules=modules, naming="kohya", total=len(modules), architecture=model.family.architecture)


def together(model: Model) -> dict[str, Lora]:
    """Two LoRAs of different ranks."""
    return {"a": drawn_lora(model, 0), "b": drawn_lora(model, 1, rank=3)}


def test_attached_loras_start_at_one_and_zero_is_the_base_bit_for_bit(
    family: ModelFamily, flux2: Model, transformer: nn.Module
) -> None:
    quantised(transformer)
    base = velocity(family, transformer)
    names = attach_loras(transformer, together(flux2))
    at_one = velocity(family, transformer)
    set_strengths(transformer, dict.fromkeys(names, 0.0))
    assert torch.equal(velocity(family, transformer), base)
    set_strengths(transformer, dict.fromkeys(names, 1.0))
    assert torch.equal(velocity(family, transformer), at_one)
    assert not torch.allclose(at_one, base, atol=1e-3)


def test_two_loras_at_a_half_equal_the_one_file_of_both(
    family: ModelFamily, flux2: Model, transformer: nn.Module, tmp_path: Path
) -> None:
    whole = deepcopy(transformer)
    loras = together(flux2)
    set_strengths(transformer, dict.fromkeys(attach_loras(transformer, loras), 0.5))
    pairs = {}
    for module, first in loras["a"].modules.items():
        second = loras["b"].modules[module]
        up = torch.cat([0.5 * first.scale * first.up, 0.5 * second.scale * second.up], dim=1)
        pairs[module] = (torch.cat([first.down, second.down]), up)
    save_file(written(pairs, lambda name: f"transformer.{name}", AB), tmp_path / "both.safetensors")
    attach_loras(whole, read_loras([str(tmp_path / "both.safetensors")], flux2))
    torch.testing.assert_close(velocity(family, transformer), velocity(family, whole), rtol=0, atol=1e-5)


@pytest.mark.parametrize("strengths", [(1.0, 0.0), (0.7, -0.4), (0.0, 0.0)])
def test_merged_weights_draw_what_attached_loras_draw(
    family: ModelFamily, flux2: Model, transformer: nn.Module, strengths: tuple[float, float]
) -> None:
    bare = [path for path, _ in transformer.named_modules()]
    names = attach_loras(transformer, together(flux2))
    chosen = dict(zip(names, strengths, strict=True))
    set_strengths(transformer, chosen)
    live = velocity(family, transformer)
    merge_loras(transformer, chosen)
    torch.testing.assert_close(velocity(family, transformer), live, rtol=0, atol=1e-5)
    assert [path for path, _ in transformer.named_modules()] == bare
    assert not hasattr(transformer, "peft_config")
    assert len(attach_loras(transformer, together(flux2))) == 2


@pytest.mark.parametrize("kind", ["fp8", "int8", "nf4"])
def test_a_quantised_base_is_merged_to_the_sum_quantised(flux2: Model, transformer: nn.Module, kind: str) -> None:
    quantised(transformer, kind)
    lora = drawn_lora(flux2, 0)
    wanted = {
        path: transformer.get_submodule(path).weight + 2.0 * weights.scale * weights.up @ weights.down
        for path, weights in lora.modules.items()
    }
    merge_loras(transformer, dict.fromkeys(attach_loras(transformer, {"a": lora}), 2.0))
    for path in block_linears(transformer):
        linear = transformer.get_submodule(path)
        assert isinstance(linear, FrozenLinear)
        assert linear.kind == kind
        again = FrozenLinear(Stored(values=wanted[path]), None, kind, dtype=torch.float32)
        assert (linear.weight - wanted[path]).norm() < 1.01 * (again.weight - wanted[path]).norm()


def test_merging_an_adapter_that_is_not_attached_is_an_error(flux2: Model, transformer: nn.Module) -> None:
    attach_loras(transformer, together(flux2))
    with pytest.raises(KeyError, match="adapter7"):
        merge_loras(transformer, {"adapter7": 1.0})


def test_a_range_of_blocks_changes_these_blocks_and_no_other(
    flux2: Model, transformer: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    save_file(written(by_linear(flux2), lambda name: f"transformer.{name}", AB), path)
    loras = read_loras([str(path)], flux2, ["single[1:2]", "double.mlp:0.5"])
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    merge_loras(transformer, dict.fromkeys(attach_loras(transformer, loras), 1.0))
    changed = {name for name, tensor in transformer.state_dict().items() if not torch.equal(tensor, before[name])}
    single = {f"single_transformer_blocks.1.attn.{leaf}.weight" for leaf in ("to_qkv_mlp_proj", "to_out")}
    double = {f"transformer_blocks.0.{ff}.linear_{way}.weight" for ff in ("ff", "ff_context") for way in ("in", "out")}
    assert changed == single | double
    assert loras[str(path)].summary.startswith(f"6 of {len(by_linear(flux2))} modules")
    assert loras[str(path)].modules["transformer_blocks.0.ff.linear_in"].scale == 0.5
    assert loras[str(path)].modules["single_transformer_blocks.1.attn.to_out"].scale == 1.0


def test_a_lora_that_is_kept_to_blocks_leaves_other_layers_alone(
    family: ModelFamily, flux2: Model, transformer: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    save_file(written(by_linear(flux2), lambda name: f"transformer.{name}", AB), path)
    attach_loras(transformer, read_loras([str(path)], flux2, ["single"]))
    assert {name.split(".")[0] for name, _ in lora_layers(transformer)} == {"single_transformer_blocks"}


def test_a_place_that_is_named_twice_is_read_twice(flux2: Model, transformer: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(written(by_linear(flux2), lambda name: f"transformer.{name}", AB), path)
    loras = read_loras([str(path)] * 2, flux2)
    assert list(loras) == [str(path), f"{path} (2)"]
    assert attach_loras(transformer, loras) == ["adapter0", "adapter1"]
