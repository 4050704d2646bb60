"""The frozen Linear of every kind against a float64 reference, and what it keeps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from flux2_lora.matmul import E4M3
from flux2_lora.quantize import FrozenLinear, quantize_nf4, quantize_rows, stored_bytes
from flux2_lora.weights import Stored
from tests.conftest import quantised

KINDS = ("fp8", "int8", "nf4")
# Largest relative error of the whole matrix for normal weights: 3 bits of mantissa, 127 steps a row, 16 levels.
ERRORS = {"fp8": 0.03, "int8": 0.012, "nf4": 0.11}


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(128, 32)


def frozen_of(linear: nn.Linear, kind: str, dtype: torch.dtype = torch.float32) -> FrozenLinear:
    return FrozenLinear(Stored(values=linear.weight.detach()), linear.bias.detach(), kind, dtype=dtype)


def test_a_row_is_rounded_by_less_than_a_sixteenth_of_each_value(linear: nn.Linear) -> None:
    values, scale = quantize_rows(linear.weight)
    error = (values.float() * scale - linear.weight).abs()
    # e4m3 has 3 bits of mantissa: half a step is 1/16; below 2^-6 of the largest / 448 values are subnormal.
    assert (error <= linear.weight.abs() / 16 + scale * 2**-10).all()


def test_int8_rounds_to_the_nearest_step_of_the_row(linear: nn.Linear) -> None:
    values, scale = quantize_rows(linear.weight, torch.int8)
    assert ((values.float() * scale - linear.weight).abs() <= scale * 0.5001).all()


@pytest.mark.parametrize("dtype", [E4M3, torch.int8])
def test_a_row_of_zeros_stays_zero_and_finite(dtype: torch.dtype) -> None:
    values, scale = quantize_rows(torch.zeros(2, 4), dtype)
    assert torch.equal(values.float() * scale, torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("kind", "at_once", "width"),
    [
        ("fp8", quantize_rows, 8),
        ("int8", lambda weight: quantize_rows(weight, torch.int8), 8),
        ("nf4", quantize_nf4, 64),
        ("nf4", quantize_nf4, 48),
    ],
)
def test_rows_are_quantised_alike_in_pieces_and_at_once(
    kind: str, at_once: Callable[[Tensor], tuple[Tensor, Tensor]], width: int
) -> None:
    weight = torch.randn(2500, width, generator=torch.Generator().manual_seed(0))
    frozen = FrozenLinear(Stored(values=weight), None, kind, dtype=torch.float32)
    values, scale = at_once(weight)
    assert torch.equal(frozen.scale, scale)
    assert torch.equal(frozen.values.view(torch.uint8), values.view(torch.uint8))


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_is_as_close_as_its_kind_allows(linear: nn.Linear, kind: str) -> None:
    torch.nn.init.normal_(linear.weight, std=0.02)
    error = (frozen_of(linear, kind).weight - linear.weight).norm() / linear.weight.norm()
    assert ERRORS[kind] / 4 < error < ERRORS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_input_gradient_equal_a_float64_reference(linear: nn.Linear, kind: str) -> None:
    frozen = frozen_of(linear, kind)
    x = torch.randn(5, 128, requires_grad=True)
    y = frozen(x)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    weight = frozen.weight.double()
    expected = x.detach().double() @ weight.T + linear.bias.detach().double()
    assert x.grad is not None
    torch.testing.assert_close(y.detach().double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x.grad.double(), upstream.double() @ weight, atol=1e-5, rtol=1e-5)


def test_bfloat16_rounds_the_rebuilt_weight_once(linear: nn.Linear) -> None:
    frozen = frozen_of(linear, "fp8", torch.bfloat16)
    assert torch.equal(frozen.weight, (frozen.values.float() * frozen.scale).to(torch.bfloat16))


@pytest.mark.parametrize("kind", KINDS)
def test_autograd_keeps_the_bytes_and_no_wide_copy_of_the_weight(linear: nn.Linear, kind: str) -> None:
    kept: list[Tensor] = []
    frozen = frozen_of(linear, kind)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        frozen(torch.randn(5, 128, requires_grad=True))
    assert kept
    assert {t.data_ptr() for t in kept} == {frozen.values.data_ptr(), frozen.scale.data_ptr()}


@pytest.mark.parametrize("kind", KINDS)
def test_moving_to_another_type_changes_neither_bytes_nor_scales(linear: nn.Linear, kind: str) -> None:
    frozen = frozen_of(linear, kind)
    values, scale = frozen.values.clone(), frozen.scale.clone()
    frozen.to(torch.bfloat16)
    assert torch.equal(frozen.values.view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(frozen.scale, scale)


@pytest.mark.parametrize("stored", [E4M3, torch.float8_e5m2])
@pytest.mark.parametrize("scale", [None, torch.tensor([[0.013]]), torch.rand(32, 1) + 0.01])
def test_released_fp8_values_are_kept_bit_for_bit(stored: torch.dtype, scale: Tensor | None) -> None:
    values = torch.randn(32, 16, generator=torch.Generator().manual_seed(0)).to(stored)
    frozen = FrozenLinear(Stored(values=values, scale=scale), None, "fp8", dtype=torch.float32)
    assert frozen.values.dtype == stored
    assert torch.equal(frozen.values.view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(frozen.weight, values.float() * (1.0 if scale is None else scale))


@pytest.mark.parametrize(("kind", "low", "high"), [("fp8", 0.25, 0.35), ("int8", 0.25, 0.35), ("nf4", 0.14, 0.17)])
def test_blocks_are_stored_in_a_part_of_float32(transformer: nn.Module, kind: str, low: float, high: float) -> None:
    blocks = transformer.get_submodule("single_transformer_blocks")
    before = stored_bytes(blocks)
    quantised(transformer, kind)
    assert low < stored_bytes(blocks) / before < high
