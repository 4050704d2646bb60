"""Products of a quantised W without rebuilding it: how far off, in which layout, and where they are refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flux2_lora import matmul
from flux2_lora.adapters import AdapterSpec, attach, trainable
from flux2_lora.conditioning import Conditioning
from flux2_lora.errors import UserError
from flux2_lora.families import Model, load_family
from flux2_lora.host import pack
from flux2_lora.matmul import DEQUANTIZE, E4M3, Trial, refuse_matmul, round_tokens
from flux2_lora.networks.transformers import blocks_in
from flux2_lora.placement import Placement, memory_host, streamer_on
from flux2_lora.quantize import FrozenLinear, PrecisionSpec, load_frozen
from flux2_lora.stream import attach_streamer
from flux2_lora.training.memory import compile_blocks, recompute_blocks
from flux2_lora.weights import Stored
from tests.conftest import quantised

WAYS = ("fp8", "int8")
CPU = torch.device("cpu")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear_of(kind: str, weight: Tensor, *, bias: bool = True) -> FrozenLinear:
    return FrozenLinear(Stored(values=weight), numbers(len(weight), seed=9) if bias else None, kind, dtype=weight.dtype)


def off(found: Tensor, expected: Tensor) -> float:
    """Relative error of the whole."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


# Normal numbers: e4m3 rounds by 2.6 % rms, of x alone or of W and x together; int8 by 0.7 to 0.9 % of 512 numbers.
@pytest.mark.parametrize(("way", "of_x", "of_both"), [("fp8", 0.026, 0.037), ("int8", 0.0075, 0.0105)])
def test_a_product_is_off_by_the_rounding_of_x_and_of_w(way: str, of_x: float, of_both: float) -> None:
    weight, x = 0.02 * numbers(512, 512), numbers(256, 512, seed=1)
    linear = linear_of(way, weight, bias=False)
    rebuilt = linear(x)
    linear.multiply_by(way)
    assert off(linear(x), rebuilt) == pytest.approx(of_x, rel=0.05)
    assert off(linear(x), x @ weight.T) == pytest.approx(of_both, rel=0.05)


@pytest.mark.parametrize("way", WAYS)
def test_a_token_beside_a_thousandfold_one_is_as_close(way: str) -> None:
    linear, x = linear_of(way, numbers(64, 128)), numbers(32, 128, seed=1)
    linear.multiply_by(way)
    assert torch.equal(linear(torch.cat([1000 * x[:1], x[1:]]))[1:], linear(x)[1:])


@pytest.mark.parametrize("way", WAYS)
def test_tokens_of_zeros_give_the_bias(way: str) -> None:
    linear = linear_of(way, numbers(32, 16))
    linear.multiply_by(way)
    assert linear.bias is not None
    assert torch.equal(linear(torch.zeros(2, 20, 16)), linear.bias.expand(2, 20, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("to", [E4M3, torch.int8])
def test_the_largest_of_a_token_becomes_the_largest_number(dtype: torch.dtype, to: torch.dtype) -> None:
    rounded, scale = round_tokens(numbers(64, 48).to(dtype), to)
    assert (rounded.float().abs().amax(dim=1) == matmul.LARGEST[to]).all()
    assert scale.dtype == torch.float32


@pytest.mark.parametrize("way", WAYS)
def test_one_scale_for_the_whole_of_w_counts_as_one_a_row(way: str) -> None:
    values, x = numbers(32, 64).clamp(-3, 3).mul(30).round().to(matmul.STORED[way]), numbers(20, 64, seed=1)
    products = [
        FrozenLinear.of_parts(values, scale, None, way, shape=(32, 64), dtype=torch.float32)
        for scale in (torch.full((1, 1), 0.07), torch.full((32, 1), 0.07))
    ]
    for linear in products:
        linear.multiply_by(way)
    assert torch.equal(products[0](x), products[1](x))
    assert off(products[0](x), x @ (values.float() * 0.07).T) < 0.03


@pytest.mark.parametrize("way", WAYS)
def test_few_rows_are_not_rounded(way: str) -> None:
    linear, x = linear_of(way, numbers(32, 64)), numbers(2, 8, 64, seed=1)
    rebuilt = linear(x)
    linear.multiply_by(way)
    assert torch.equal(linear(x), rebuilt)


def test_tokens_multiplied_in_parts_are_those_multiplied_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, x = linear_of("int8", numbers(32, 64)), numbers(70, 64, seed=1)
    linear.multiply_by("int8")
    whole, rows, real = linear(x), [], torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda left, right: (rows.append(len(left)), real(left, right))[1])
    monkeypatch.setattr(matmul, "_ROWS_AT_ONCE", 32)
    assert torch.equal(linear(x), whole)
    assert rows == [32, 32, 17]  # CUDA takes no fewer than 17


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_of_x_is_that_of_the_rebuilt_weight(way: str) -> None:
    linear, upstream = linear_of(way, numbers(32, 64)), numbers(20, 32, seed=2)
    gradients = []
    for one in (DEQUANTIZE, way):
        linear.multiply_by(one)
        x = numbers(20, 64, seed=1).requires_grad_()
        linear(x).backward(upstream)
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize(("way", "called"), [("fp8", "_scaled_mm"), ("int8", "_int_mm")])
def test_the_device_gets_rows_by_columns_in_8_bits_whatever_the_layout_of_x(
    monkeypatch: pytest.MonkeyPatch, way: str, called: str
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    real = getattr(torch, called)

    def spy(left: Tensor, right: Tensor, **more: Any) -> Tensor:
        seen.append((left, right))
        product: Tensor = real(left, right, **more)
        return product

    monkeypatch.setattr(torch, called, spy)
    linear = linear_of(way, numbers(32, 64))
    linear.multiply_by(way)
    for x in (numbers(20, 64), numbers(64, 20).T, numbers(2, 20, 128)[..., ::2]):
        linear(x)
    for left, right in seen:
        assert left.dtype == right.dtype == matmul.STORED[way]
        assert left.stride() == (64, 1)
        assert right.stride() == (1, 64)
        assert right.data_ptr() == linear.values.data_ptr()
    assert len(seen) == 3


@pytest.mark.parametrize("way", WAYS)
def test_a_weight_in_the_other_layout_does_not_reach_the_device(way: str) -> None:
    linear = linear_of(way, numbers(64, 64))
    linear.multiply_by(way)
    linear.values = linear.values.t()
    with pytest.raises(AssertionError, match="column-major"):
        linear(numbers(20, 64))


@pytest.mark.parametrize(
    ("way", "base", "kind", "text", "remedy"),
    [
        ("fp8", "int8", "cpu", "stored in fp8, and precision.base=int8", "set precision.base=fp8, or"),
        ("int8", "nf4", "cpu", "stored in int8, and precision.base=nf4", "set precision.base=int8, or"),
        ("fp8", "fp8", "mps", "for NVIDIA cards, and the device is mps", "set precision.matmul=dequantize"),
    ],
)
def test_a_way_that_cannot_be_is_refused_with_one_that_can(
    way: str, base: str, kind: str, text: str, remedy: str
) -> None:
    with pytest.raises(UserError) as refused:
        refuse_matmul(way, base, torch.device(kind))
    assert text in refused.value.what
    assert refused.value.remedy.startswith(remedy)


@pytest.mark.parametrize(
    ("way", "capability", "remedy"),
    [
        ("fp8", (8, 6), "set precision.base=int8 precision.matmul=int8, or precision.matmul=dequantize"),
        ("int8", (7, 0), "set precision.matmul=dequantize"),
    ],
)
def test_a_card_without_the_units_is_refused(
    monkeypatch: pytest.MonkeyPatch, way: str, capability: tuple[int, int], remedy: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "some card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with pytest.raises(UserError) as refused:
        refuse_matmul(way, way, torch.device("cuda"))
    assert f"and some card has {capability[0]}.{capability[1]}" in refused.value.what
    assert refused.value.remedy == remedy
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    refuse_matmul(way, way, torch.device("cuda"))


def test_sides_that_the_units_do_not_take_are_refused_before_anything_is_read(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformer = tiny_model.empty_transformer()
    transformer.set_submodule("transformer_blocks.0.ff.linear_in", nn.Linear(24, 32, device="meta"))
    monkeypatch.setattr(Model, "empty_transformer", lambda _: transformer)
    monkeypatch.setattr(type(tiny_model.weights), "read", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(UserError, match=r"multiples of 16, and transformer_blocks\.0\.ff\.linear_in is 32 x 24"):
        load_frozen(tiny_model, PrecisionSpec(base="fp8", matmul="fp8"), CPU)


def test_fp8_of_another_kind_is_refused() -> None:
    stored = Stored(values=numbers(16, 16).to(torch.float8_e5m2))
    linear = FrozenLinear(stored, None, "fp8", dtype=torch.float32)
    with pytest.raises(
        UserError, match=r"multiplies torch\.float8_e4m3fn, and the model's file has torch\.float8_e5m2"
    ):
        linear.multiply_by("fp8")


@pytest.mark.parametrize(
    ("direct_s", "cause", "used", "text"),
    [
        (0.5, None, "fp8", "precision.matmul=fp8 takes 500.00 ms a product where a rebuilt weight takes 1000.00 ms"),
        (0.99, None, DEQUANTIZE, "precision.matmul=fp8 is not used: it takes 990.00 ms"),
        (0.0, "no kernel", DEQUANTIZE, "is not used: this PyTorch does not multiply so here (no kernel)"),
    ],
)
def test_only_a_faster_way_is_used_and_the_line_says_which(
    direct_s: float, cause: str | None, used: str, text: str
) -> None:
    trial = Trial(matmul="fp8", direct_s=direct_s, rebuilt_s=1.0, cause=cause)
    assert trial.used == used
    assert text in trial.words


def test_a_trial_times_both_ways_and_tells_what_the_device_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda _: None)
    monkeypatch.setattr(matmul, "_TRIAL", (32, 64, 16))
    linear = linear_of("fp8", matmul.trial_weight(CPU), bias=False)

    def multiply(way: str, x: Tensor) -> None:
        linear.multiply_by(way)
        linear(x)

    trial = matmul.try_out("fp8", multiply, CPU)
    assert trial.direct_s > 0
    assert trial.rebuilt_s > 0
    monkeypatch.setattr(torch, "_scaled_mm", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no kernel\nmore")))
    assert matmul.try_out("fp8", multiply, CPU).cause == "no kernel"


def gradients_of(transformer: nn.Module, way: str) -> Tensor:
    """Of an adapter that has left its start, on one batch of noise, with products taken in a way."""
    for module in transformer.modules():
        if isinstance(module, FrozenLinear):
            module.multiply_by(way)
    family = load_family("flux2_small")
    attach(transformer, family.architecture, AdapterSpec(rank=4), seed=0)
    for number, parameter in enumerate(trainable(transformer).values()):
        parameter.data.copy_(0.3 * numbers(*parameter.shape, seed=number))
    moved = family.velocity(
        transformer, numbers(2, 128, 4, 4), torch.tensor([0.3, 0.8]), Conditioning(embeds=numbers(2, 12, 24, seed=5))
    )
    (moved - numbers(*moved.shape, seed=7)).square().mean().backward()
    return torch.cat([one.grad.flatten() for one in trainable(transformer).values() if one.grad is not None])


# Whole-vector cosine; every layer rounds anew, so the model's is lower than one product's 0.9997.
@pytest.mark.parametrize(("way", "least"), [("fp8", 0.99), ("int8", 0.999)])
def test_gradients_of_the_adapter_point_where_those_of_rebuilt_weights_do(
    transformer: nn.Module, way: str, least: float
) -> None:
    base = quantised(transformer, way)
    found = [gradients_of(copy.deepcopy(base), one) for one in (DEQUANTIZE, way)]
    assert least < float(torch.cosine_similarity(*found, dim=0)) < 1 - 1e-7


@pytest.mark.parametrize("plain", [0, 2])
@pytest.mark.parametrize("way", WAYS)
def test_streamed_weights_are_multiplied_as_resident_ones_are(transformer: nn.Module, way: str, plain: int) -> None:
    base = quantised(transformer, way)
    resident = gradients_of(copy.deepcopy(base), way)
    blocks, host = list(blocks_in(base).values()), memory_host("staged", CPU)
    layouts = [pack(block) for block in blocks]
    for number, (block, layout) in enumerate(zip(blocks, layouts, strict=True)):
        host.add(number, block, layout)
    attach_streamer(base, streamer_on(CPU, blocks, layouts, host, 1, "staged"))
    recompute_blocks(base, range(plain))
    assert torch.equal(gradients_of(base, way), resident)


@pytest.mark.parametrize("host", ["staged", "disk"])
def test_a_base_is_loaded_to_be_multiplied_as_asked(tiny_model: Model, tmp_path: Path, host: str) -> None:
    placement = Placement(resident=frozenset({1}), slots=2, host=host, folder=tmp_path)
    transformer = load_frozen(tiny_model, PrecisionSpec(base="int8", matmul="int8"), CPU, placement)
    assert {module.matmul for module in transformer.modules() if isinstance(module, FrozenLinear)} == {"int8"}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_block_multiplies_so_in_one_graph(transformer: nn.Module, way: str) -> None:
    torch.compiler.reset()
    base = quantised(transformer, way)
    eager = gradients_of(copy.deepcopy(base), way)
    compile_blocks(base, "aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients_of(base, way), eager, rtol=1e-4, atol=1e-5)
