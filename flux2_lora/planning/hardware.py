"""What a card can do: memory, and the rates at which bytes are copied and matrices multiplied; given, or measured here.

A page of configs/hardware is a budget, not a table of flags: what it leaves null is measured on this computer. The peak
rates of the pages are the vendors' for dense products with sums in float32, and the share of them that a transformer
reaches is an assumption until a step has been timed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import psutil
import torch

from flux2_lora.devices import compute_dtype, free_bytes, resident
from flux2_lora.options import option

_GB = 1e9


@dataclass(frozen=True, kw_only=True)
class HardwareSpec:
    """A budget. vram_gb: all of the card's memory, of which others hold reserved_gb and the driver context_gb.

    bf16_tflops, fp8_tflops: peak rates, of which `utilisation` is reached; fp8 null: the card has no such units.
    host_gb: memory beside the card's. Null in device, vram_gb, copy_gb_s, bf16_tflops or host_gb: as measured.
    """

    name: str = "this computer"
    device: str | None = option(None, one_of=("cuda", "mps", "cpu"))
    vram_gb: float | None = option(None, above=0)
    reserved_gb: float = option(0.6, at_least=0)
    context_gb: float | None = option(0.45, at_least=0)
    copy_gb_s: float | None = option(None, above=0)
    bf16_tflops: float | None = option(None, above=0)
    fp8_tflops: float | None = option(None, above=0)
    utilisation: float = option(0.7, above=0, at_most=1)
    host_gb: float | None = option(None, above=0)
    disk_gb_s: float = option(3.0, above=0)


@dataclass(frozen=True, kw_only=True)
class Card:
    """A budget with nothing left open. vram_bytes: what a run may hold, context included; flops_s: as reached.

    measured: whether flops_s was timed here, and not assumed.
    """

    name: str
    device: str
    vram_bytes: int
    context_bytes: int
    copy_bytes_s: float
    flops_s: float
    fp8_flops_s: float | None
    host_bytes: int
    disk_bytes_s: float
    measured: bool

    @property
    def streams(self) -> bool:
        """Whether it has a memory of its own, to which blocks can be copied."""
        return self.device == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(torch.device(self.device))


def card_of(spec: HardwareSpec, device: torch.device) -> Card:
    """The budget of a page, with what it leaves open measured on `device`; of another device than the page's, assumed.

    A CPU's, or Apple's, memory is the host's: context is then what this process holds already.
    """
    kind = spec.device or device.type
    here = torch.device(kind) if kind == device.type else torch.device("cpu")
    shared = kind != "cuda"
    context = resident() if shared else int(_GB * (spec.context_gb or 0))
    vram = free_bytes(here) + context if spec.vram_gb is None else int(_GB * (spec.vram_gb - spec.reserved_gb))
    rate = spec.bf16_tflops * 1e12 * spec.utilisation if spec.bf16_tflops else timed_flops(here)
    host = int(_GB * spec.host_gb) if spec.host_gb else int(psutil.virtual_memory().available)
    copied = _GB * spec.copy_gb_s if spec.copy_gb_s else timed_copy(here)
    return Card(
        name=spec.name,
        device=kind,
        vram_bytes=vram,
        context_bytes=context,
        copy_bytes_s=copied,
        flops_s=rate,
        fp8_flops_s=spec.fp8_tflops * 1e12 * spec.utilisation if spec.fp8_tflops else None,
        host_bytes=host,
        disk_bytes_s=_GB * spec.disk_gb_s,
        measured=spec.bf16_tflops is None and kind == device.type,
    )


def timed_flops(device: torch.device) -> float:
    """Operations a second of a matrix product in the type that the device computes in; the best of three."""
    side = 4096 if device.type == "cuda" else 512
    left, right = (torch.ones(side, side, dtype=compute_dtype(device), device=device) for _ in range(2))
    return 2 * side**3 / min(_timed(device, lambda: left @ right) for _ in range(3))


def timed_copy(device: torch.device) -> float:
    """Bytes a second from pinned host memory to the device; within one memory on devices that share the host's."""
    size = 2**28 if device.type == "cuda" else 2**24
    source = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(size, dtype=torch.uint8, device=device)
    return size / min(_timed(device, lambda: target.copy_(source, non_blocking=True)) for _ in range(3))


def _timed(device: torch.device, work: object) -> float:
    assert callable(work)
    _wait(device)
    began = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
