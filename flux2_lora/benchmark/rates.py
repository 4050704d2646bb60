"""How fast a card copies and multiplies, as measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from flux2_lora.devices import compute_dtype


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Bytes a second from pinned host memory, and bf16 operations a second of a large product; as measured."""

    copy: float = 0.0
    flops: float = 0.0

    @property
    def words(self) -> str:
        return f"{self.copy / 1e9:.1f} GB/s to the device, {self.flops / 1e12:.3g} TFLOP/s"


def measured_rates(device: torch.device) -> Rates:
    """The best of five copies, and of five products as FLUX.1's MLP takes them."""
    cuda = device.type == "cuda"
    size, (rows, depth, columns) = (2**30, (4608, 3072, 12288)) if cuda else (2**24, (128, 256, 512))
    source = torch.empty(size, dtype=torch.uint8, pin_memory=cuda)
    target = torch.empty(size, dtype=torch.uint8, device=device)
    kind = {"dtype": compute_dtype(device), "device": device}
    left, right = torch.randn(rows, depth, **kind), torch.randn(depth, columns, **kind)  # type: ignore[call-overload]
    copy = min(seconds(lambda: target.copy_(source, non_blocking=True), device) for _ in range(5))
    multiply = min(seconds(lambda: left @ right, device) for _ in range(5))
    return Rates(copy=size / copy, flops=2 * rows * depth * columns / multiply)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """What work takes until the device has done it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - began
