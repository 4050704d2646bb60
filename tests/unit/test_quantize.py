"""The frozen FP8 Linear against a float64 reference, and what freezing does to a transformer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flux2_lora.quantize import E4M3, FP8Linear, PrecisionSpec, freeze, quantize_rows, stored_bytes


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(48, 32)


def test_a_row_is_rounded_by_less_than_a_sixteenth_of_each_value(linear: nn.Linear) -> None:
    values, scale = quantize_rows(linear.weight)
    error = (values.float() * scale - linear.weight).abs()
    # e4m3 has 3 bits of mantissa: half a step is 1/16; below 2^-6 of the largest / 448 values are subnormal.
    assert (error <= linear.weight.abs() / 16 + scale * 2**-10).all()


def test_a_row_of_zeros_stays_zero_and_finite() -> None:
    values, scale = quantize_rows(torch.zeros(2, 4))
    assert torch.equal(values.float() * scale, torch.zeros(2, 4))


def test_forward_and_input_gradient_equal_a_float64_reference(linear: nn.Linear) -> None:
    frozen = FP8Linear(linear)
    x = torch.randn(5, 48, requires_grad=True)
    y = frozen(x)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    weight = frozen.values.double() * frozen.scale.double()
    expected = x.detach().double() @ weight.T + linear.bias.detach().double()
    assert x.grad is not None
    torch.testing.assert_close(y.detach().double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x.grad.double(), upstream.double() @ weight, atol=1e-5, rtol=1e-5)


def test_autograd_keeps_the_bytes_and_no_wide_copy_of_the_weight(linear: nn.Linear) -> None:
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        FP8Linear(linear)(torch.randn(5, 48, requires_grad=True))
    assert [t.dtype for t in kept if t.shape == linear.weight.shape] == [E4M3]


def test_moving_to_another_type_changes_neither_bytes_nor_scales(linear: nn.Linear) -> None:
    frozen = FP8Linear(linear)
    values, scale = frozen.values.clone(), frozen.scale.clone()
    frozen.to(torch.bfloat16)
    assert torch.equal(frozen.values.view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(frozen.scale, scale)


def test_freezing_quantises_every_linear_of_the_blocks_and_no_other(transformer: nn.Module) -> None:
    inside = {n for n, m in transformer.named_modules() if isinstance(m, nn.Linear) and "transformer_blocks" in n}
    assert freeze(transformer, PrecisionSpec(base="fp8")) == len(inside) == 12 + 2 * 2
    assert {name for name, m in transformer.named_modules() if isinstance(m, FP8Linear)} == inside


def test_fp8_stores_the_blocks_in_about_a_quarter_of_float32(transformer: nn.Module) -> None:
    blocks = transformer.get_submodule("single_transformer_blocks")
    before = stored_bytes(blocks)
    freeze(transformer, PrecisionSpec(base="fp8"))
    assert 0.25 < stored_bytes(blocks) / before < 0.35
