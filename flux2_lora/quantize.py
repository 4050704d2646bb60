"""A frozen Linear that stores one byte a weight or less, and the base model read into such Linears.

Law: neither pass keeps W. Forward rebuilds it, multiplies and forgets; backward asks for the same bytes again. Autograd
would otherwise hold a 16-bit copy of every frozen layer until its backward, which is what an 8 GB card does not have.
W is scale * values: one scale a row (fp8, int8), one a tensor (files that were released so), or one for 64 numbers
(nf4, Dettmers et al. 2023, arXiv:2305.14314, section 3). What a file stores in FP8 is kept bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flux2_lora.devices import compute_dtype
from flux2_lora.errors import UserError
from flux2_lora.families import Model
from flux2_lora.networks.transformers import block_linears
from flux2_lora.options import option
from flux2_lora.weights import Stored

E4M3 = torch.float8_e4m3fn
_FP8 = (E4M3, torch.float8_e5m2)
_LARGEST = {E4M3: torch.finfo(E4M3).max, torch.int8: 127.0}
_NF4_BLOCK = 64
_ROWS_AT_ONCE = 1024  # quantised together: what is in float32 meanwhile stays below 100 MB for 24,576 columns


@dataclass(frozen=True, kw_only=True)
class PrecisionSpec:
    """How the frozen base is stored: fp8 (e4m3) or int8 with one scale a row, nf4, bf16 or fp32."""

    base: str = option("fp8", one_of=("fp8", "int8", "nf4", "bf16", "fp32"))


def quantize_rows(weight: Tensor, dtype: torch.dtype = E4M3) -> tuple[Tensor, Tensor]:
    """[out in] -> (e4m3 or int8 [out in], scale [out 1] float32): a row's largest magnitude becomes 448 or 127."""
    weight = weight.detach().float()
    largest = weight.abs().amax(dim=1, keepdim=True)
    scale = torch.where(largest > 0, largest / _LARGEST[dtype], torch.ones_like(largest))
    values = weight / scale
    return (values.round() if dtype == torch.int8 else values).to(dtype), scale


def quantize_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out in] -> (two numbers a byte [out * in / 2, 1], largest magnitude of each 64 numbers [out * in / 64])."""
    try:
        from bitsandbytes.functional import quantize_4bit
    except ImportError as error:
        raise UserError("precision=nf4 needs bitsandbytes", "pip install bitsandbytes, or precision=fp8") from error
    packed, state = quantize_4bit(weight.float().contiguous(), blocksize=_NF4_BLOCK, quant_type="nf4")
    return packed, state.absmax


def _by_scale(values: Tensor, scale: Tensor, dtype: torch.dtype, _: tuple[int, int]) -> Tensor:
    """Rounded once: values are exact in bfloat16, and the product is taken in the wider type of the two.

    In place: a second copy of the widest projection of FLUX.2 dev would be 0.7 GB.
    """
    return values.to(dtype, copy=True).mul_(scale)


def _by_nf4(values: Tensor, scale: Tensor, dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:
    """The operator is there since bitsandbytes was imported to quantise."""
    rebuilt: Tensor = torch.ops.bitsandbytes.dequantize_4bit(values, scale, _NF4_BLOCK, "nf4", shape, dtype)
    return rebuilt


_QUANTIZE: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "fp8": quantize_rows,
    "int8": partial(quantize_rows, dtype=torch.int8),
    "nf4": quantize_nf4,
}
_REBUILD: dict[str, Callable[[Tensor, Tensor, torch.dtype, tuple[int, int]], Tensor]] = {
    "fp8": _by_scale,
    "int8": _by_scale,
    "nf4": _by_nf4,
}


class _FrozenMatmul(torch.autograd.Function):
    """x W^T + b with a gradient for x only; saves the byte form of W, not W."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None, kind: str, shape: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(values, scale)
        ctx.kind, ctx.shape = kind, shape
        return F.linear(x, _REBUILD[kind](values, scale, x.dtype, shape), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        values, scale = ctx.saved_tensors
        weight = _REBUILD[ctx.kind](values, scale, gradient.dtype, ctx.shape)
        return gradient @ weight, None, None, None, None, None


class FrozenLinear(nn.Linear):
    """y = x W^T + b with frozen W [out in] in `kind`; computes in the type of x (or of autocast).

    A subclass of nn.Linear so that PEFT wraps it as one. `weight` is rebuilt on each reading and has no gradient.
    """

    values: Tensor
    scale: Tensor

    def __init__(
        self, stored: Stored, bias: Tensor | None, kind: str, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        """stored: W as a file has it; its FP8 is kept where kind is fp8. dtype: of `weight` and of the bias."""
        nn.Module.__init__(self)
        self.out_features, self.in_features = stored.values.shape
        self.kind, self.compute_dtype = kind, dtype
        values, scale = _quantized(stored, kind, torch.device(device))
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.to(device, dtype))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return _REBUILD[self.kind](self.values, self.scale, self.compute_dtype, (self.out_features, self.in_features))

    def add(self, update: Tensor) -> None:
        """W += update [out in], in float32; the sum is quantised anew in the same kind."""
        weight = _REBUILD[self.kind](self.values, self.scale, torch.float32, (self.out_features, self.in_features))
        self.values, self.scale = _quantized(Stored(values=weight + update), self.kind, weight.device)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        shape = (self.out_features, self.in_features)
        result: Tensor = _FrozenMatmul.apply(x, self.values, self.scale, bias, self.kind, shape)
        return result

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenLinear:  # noqa: FBT001, FBT002 - torch's signature
        """Follow moves between devices, but let no `.to(dtype)` widen the bytes or narrow the scales."""
        before = {name: getattr(self, name) for name in ("values", "scale")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, kept in before.items():
            moved = getattr(self, name)
            setattr(self, name, moved if moved.dtype == kept.dtype else kept.to(moved.device))
        return self


def load_frozen(model: Model, spec: PrecisionSpec, device: torch.device) -> nn.Module:
    """The model's transformer on the device, frozen, the Linears of its blocks in the precision asked for.

    Tensors are read, quantised and moved one at a time, so host memory holds the quantised model and one weight.
    Embedders, modulation and the last layer keep their type: few bytes, and the most sensitive.
    """
    transformer, weights = model.empty_transformer(), model.weights
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(spec.base, compute_dtype(device))
    inside = set(block_linears(transformer)) if spec.base in _REBUILD else set()
    for path, module in list(transformer.named_modules()):
        own = {name: f"{path}.{name}" if path else name for name, _ in module.named_parameters(recurse=False)}
        if path in inside:
            bias = weights.read(own["bias"]).dense(dtype) if "bias" in own else None
            stored = weights.read(own["weight"])
            transformer.set_submodule(path, FrozenLinear(stored, bias, spec.base, dtype=dtype, device=device))
            continue
        for name, full in own.items():
            setattr(module, name, nn.Parameter(weights.read(full).dense(dtype, device), requires_grad=False))
    return transformer.to(device)


def stored_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers as they are stored."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _quantized(stored: Stored, kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """(values, scale) of a kind, on the device."""
    if kind == "fp8" and stored.values.dtype in _FP8:
        kept = stored.to(device)
        return kept.values, torch.ones(1, 1, device=device) if kept.scale is None else kept.scale
    # Pieces of 1024 rows are whole blocks of 64 numbers too, whatever the width.
    starts = range(0, len(stored.values), _ROWS_AT_ONCE)
    pieces = [_QUANTIZE[kind](stored.rows(i, i + _ROWS_AT_ONCE).dense(torch.float32, device)) for i in starts]
    values, scales = zip(*pieces, strict=True)
    return torch.cat(values), torch.cat(scales)
