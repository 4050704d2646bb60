"""A frozen Linear that stores one byte a weight: e4m3 values and one scale a row.

Law: W = scale[row] * fp8[row, column], and neither pass keeps W. Forward dequantises, multiplies and forgets; backward
asks for the same bytes again. Autograd would otherwise hold a 16-bit copy of every frozen layer until its backward,
which is what an 8 GB card does not have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flux2_lora.devices import compute_dtype
from flux2_lora.families import ModelFamily
from flux2_lora.options import option

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max


@dataclass(frozen=True, kw_only=True)
class PrecisionSpec:
    """How the frozen base is stored: fp8 (e4m3, one scale a row), bf16 or fp32."""

    base: str = option("fp8", one_of=("fp8", "bf16", "fp32"))


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out in] -> (e4m3 [out in], scale [out 1] float32): the largest magnitude of each row becomes 448."""
    largest = weight.detach().float().abs().amax(dim=1, keepdim=True)
    scale = torch.where(largest > 0, largest / E4M3_MAX, torch.ones_like(largest))
    return (weight.detach().float() / scale).to(E4M3), scale


class _FrozenMatmul(torch.autograd.Function):
    """x W^T + b with a gradient for x only; saves the byte form of W, not W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(values, scale)
        return F.linear(x, _dequantize(values, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        values, scale = ctx.saved_tensors
        return gradient @ _dequantize(values, scale, gradient.dtype), None, None, None


def _dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype) * scale.to(dtype)


class FP8Linear(nn.Linear):
    """y = x W^T + b with frozen W [out in] in e4m3; computes in the type of x (or of autocast).

    A subclass of nn.Linear so that PEFT wraps it as one. `weight` is rebuilt on each reading and has no gradient.
    """

    values: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute_dtype = linear.weight.dtype
        values, scale = quantize_rows(linear.weight)
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return _dequantize(self.values, self.scale, self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        result: Tensor = _FrozenMatmul.apply(x, self.values, self.scale, bias)
        return result

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FP8Linear:  # noqa: FBT001, FBT002 - torch's signature
        """Follow moves between devices, but let no `.to(dtype)` widen the bytes or narrow the scales."""
        kept = {"values": E4M3, "scale": torch.float32}
        before = {name: getattr(self, name) for name in kept}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, dtype in kept.items():
            moved = getattr(self, name)
            setattr(self, name, moved if moved.dtype == dtype else before[name].to(moved.device))
        return self


def freeze(transformer: nn.Module, spec: PrecisionSpec) -> int:
    """Freeze every parameter and quantise the Linears inside the blocks; returns how many were quantised.

    Blocks are the members of the model's ModuleLists; embedders, modulation and the last layer keep their type: they
    are a few per cent of the bytes and the most sensitive.
    """
    transformer.requires_grad_(False)
    if spec.base != "fp8":
        transformer.to(torch.bfloat16 if spec.base == "bf16" else torch.float32)
        return 0
    blocks = [child for child in transformer.children() if isinstance(child, nn.ModuleList)]
    inside = [
        (parent, name, child)
        for parent in (module for block in blocks for module in block.modules())
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]
    for parent, name, child in inside:
        setattr(parent, name, FP8Linear(child))
    return len(inside)


def load_frozen(family: ModelFamily, folder: Path, spec: PrecisionSpec, device: torch.device) -> nn.Module:
    """A family's transformer, frozen in the precision asked for, on the device."""
    transformer = family.load_transformer(folder, compute_dtype(device))
    freeze(transformer, spec)
    return transformer.to(device)


def stored_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers as they are stored."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
