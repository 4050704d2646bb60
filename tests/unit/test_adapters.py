"""Laws of the adapters: all targets, only they learn, strength 0 is the base, a file comes back as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flux2_lora import adapters
from flux2_lora.adapters import Adapter, AdapterSpec, attach, set_strengths, state_of
from flux2_lora.conditioning import Conditioning
from flux2_lora.errors import UserError
from flux2_lora.families import ModelFamily
from flux2_lora.files import tensors_digest
from flux2_lora.lora_linear import LoraLinear
from flux2_lora.networks.transformers import block_linears
from flux2_lora.training.step import Sample, training_loss
from tests.conftest import drawn, quantised

SPEC = AdapterSpec(rank=4, alpha=8)


def samples() -> list[Sample]:
    noise = torch.Generator().manual_seed(0)
    embeds = torch.randn(2, 5, 24, generator=noise)
    latents = torch.randn(2, 128, 2, 3, generator=noise)
    return [
        Sample(
            latents=latents[place],
            conditioning=Conditioning(embeds=embeds[place : place + 1]),
            mask=torch.ones(1, 2, 3),
            key=str(place),
        )
        for place in range(2)
    ]


def loss_of(family: ModelFamily, transformer: nn.Module, step: int = 0) -> Tensor:
    return training_loss(family, transformer, drawn(family, samples(), step))


def filled(transformer: nn.Module) -> None:
    """Give the up matrices values, as training would."""
    for _, layer in adapters.lora_layers(transformer):
        nn.init.normal_(layer.lora_B["default"].weight, std=0.1)


def velocity(family: ModelFamily, transformer: nn.Module) -> Tensor:
    data = drawn(family, samples())
    with torch.no_grad():
        return family.velocity(transformer, data.latents, torch.tensor([0.3, 0.7]), data.conditioning)


def test_every_projection_of_the_model_is_targeted(family: ModelFamily, transformer: nn.Module) -> None:
    quantised(transformer)
    there = block_linears(transformer)
    assert attach(transformer, "flux2", SPEC, seed=0) == len(there) == 16
    assert block_linears(transformer) == there


@pytest.mark.parametrize(("targets", "count"), [(["attention"], 8 + 4), (["mlp"], 4 + 4)])
def test_a_group_targets_its_projections_and_the_fused_ones(
    family: ModelFamily, transformer: nn.Module, targets: list[str], count: int
) -> None:
    assert attach(transformer, "flux2", AdapterSpec(rank=2, targets=targets), seed=0) == count


def test_only_adapters_receive_gradients_and_each_of_them_does(family: ModelFamily, transformer: nn.Module) -> None:
    quantised(transformer)
    attach(transformer, "flux2", SPEC, seed=0)
    filled(transformer)
    loss_of(family, transformer).backward()
    learning = {name for name, p in transformer.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert learning == {name for name, _ in transformer.named_parameters() if ".lora_" in name}
    assert len(learning) == 2 * 16


def test_training_changes_no_byte_of_the_base(family: ModelFamily, transformer: nn.Module) -> None:
    quantised(transformer)
    attach(transformer, "flux2", SPEC, seed=0)
    base = {k: v for k, v in transformer.state_dict().items() if ".lora_" not in k}
    before = tensors_digest({k: v.clone() for k, v in base.items()})
    optimizer = torch.optim.AdamW(adapters.trainable(transformer).values(), lr=1e-2)
    for step in range(3):
        loss_of(family, transformer, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert tensors_digest({k: v for k, v in transformer.state_dict().items() if ".lora_" not in k}) == before


def test_strength_zero_is_the_base_bit_for_bit_and_one_is_not(family: ModelFamily, transformer: nn.Module) -> None:
    quantised(transformer)
    base = velocity(family, transformer)
    attach(transformer, "flux2", SPEC, seed=0)
    filled(transformer)
    adapted = velocity(family, transformer)
    set_strengths(transformer, {"default": 0.0})
    assert torch.equal(velocity(family, transformer), base)
    set_strengths(transformer, {"default": 1.0})
    assert torch.equal(velocity(family, transformer), adapted)
    assert not torch.allclose(adapted, base, atol=1e-3)


def test_a_fresh_adapter_is_a_function_of_its_seed(family: ModelFamily, transformer: nn.Module) -> None:
    attach(transformer, "flux2", SPEC, seed=3)
    torch.manual_seed(99)
    from copy import deepcopy

    again = deepcopy(transformer)
    for path, layer in adapters.lora_layers(again):
        down = layer.lora_A["default"].weight
        expected = torch.empty(down.shape).uniform_(
            -(down.shape[1] ** -0.5), down.shape[1] ** -0.5, generator=adapters.generator(3, "adapter", path)
        )
        assert torch.equal(down, expected)


def test_a_saved_adapter_is_read_as_it_was(family: ModelFamily, transformer: nn.Module, tmp_path: Path) -> None:
    attach(transformer, "flux2", SPEC, seed=0)
    filled(transformer)
    saved = Adapter(state=state_of(transformer), rank=4, alpha=8, targets=SPEC.targets, family=family.name)
    adapters.save_adapter(tmp_path / adapters.WEIGHTS, saved)
    read = adapters.read_adapter(tmp_path / adapters.WEIGHTS)
    assert tensors_digest(read.state) == tensors_digest(saved.state)
    assert (read.rank, read.alpha, read.targets, read.family) == (4, 8, SPEC.targets, family.name)


def test_tensors_that_do_not_fit_are_named(family: ModelFamily, transformer: nn.Module) -> None:
    attach(transformer, "flux2", SPEC, seed=0)
    state = state_of(transformer)
    name = next(iter(state))
    state[name] = state[name][:, :3]
    with pytest.raises(UserError, match="1 of 32 tensors differ"):
        adapters.load_state(transformer, state, source="file")


def test_the_layer_computes_what_peft_computes(
    family: ModelFamily, transformer: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantised(transformer)
    attach(transformer, "flux2", SPEC, seed=0)
    filled(transformer)

    def learned() -> tuple[Tensor, list[Tensor]]:
        transformer.zero_grad()
        loss_of(family, transformer).backward()
        return velocity(family, transformer), [
            p.grad for p in adapters.trainable(transformer).values() if p.grad is not None
        ]

    with adapters.switched_off(transformer):
        base = velocity(family, transformer)
    moved, gradients = learned()
    monkeypatch.delattr(LoraLinear, "forward")
    by_peft, gradients_by_peft = learned()
    assert not torch.equal(moved, base)
    torch.testing.assert_close(moved, by_peft)
    torch.testing.assert_close(gradients, gradients_by_peft)


@pytest.mark.parametrize("autocast", [True, False])
def test_an_update_keeps_the_type_of_its_base(transformer: nn.Module, *, autocast: bool) -> None:
    attach(transformer.bfloat16(), "flux2", SPEC, seed=0)
    filled(transformer)
    _, layer = next(iter(adapters.lora_layers(transformer)))
    x = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        moved = layer(x)
    assert moved.dtype == torch.bfloat16
    assert (moved - layer.base_layer(x)).abs().max() > 0
