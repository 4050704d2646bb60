"""Which device computes, and in which type."""

from __future__ import annotations

import ctypes
import mmap
import sys
import weakref
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from flux2_lora.errors import UserError, did_you_mean


def pick_device(name: str) -> torch.device:
    """auto takes CUDA (ROCm included), then Apple's MPS, then the CPU; UserError for a device that is not here."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, here in there.items() if here))
    if name not in there:
        raise UserError(f"device={name} is not a device", did_you_mean(name, ["auto", *there]))
    if not there[name]:
        raise UserError(f"device={name} is not available on this machine", "use device=auto or device=cpu")
    return torch.device(name)


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a CUDA device, float32 elsewhere (half types are slow or wrong on CPUs and MPS)."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def largest_resident() -> int:
    """Bytes of host memory that this process has held at most; not on Windows. Linux counts in KiB, macOS in bytes."""
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def resident() -> int:
    """Bytes of host memory that this process holds now."""
    return int(psutil.Process().memory_info().rss)


def free_bytes(device: torch.device) -> int:
    """Memory of a device that nothing holds; what PyTorch keeps for itself counts as free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    return host_bytes()


def host_bytes() -> int:
    """Memory of the host that nothing holds."""
    return int(psutil.virtual_memory().available)


def pinned(size: int) -> Tensor:
    """uint8 [size] that a CUDA device copies from by itself, of that size; RuntimeError where the system refuses.

    PyTorch's own pinned memory comes in powers of two, which for blocks of 340 MB is half as much again.
    """
    memory = np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8)
    flat, runtime = torch.from_numpy(memory), torch.cuda.cudart()
    torch.cuda.check_error(int(runtime.cudaHostRegister(flat.data_ptr(), size, 0)))
    # Before the array lets go of its pages, while an mmap tells its weak references after it has.
    weakref.finalize(memory, runtime.cudaHostUnregister, flat.data_ptr()).atexit = False
    return flat


def in_backward() -> bool:
    """Whether this thread runs a backward pass, as torch.utils.checkpoint asks too."""
    return bool(torch._C._current_graph_task_id() != -1)  # noqa: SLF001 - there is no public question


def return_free_memory() -> None:
    """Hand freed host memory back to the system; glibc would keep some 30 MB for every layer of an encoder that ran.

    Does nothing with another C library.
    """
    trim = _of_the_c_library("malloc_trim")
    if trim is not None:
        trim(0)


def keep_free_memory() -> None:
    """Keep freed host memory for the next step of a loop on the CPU instead of handing it back and forth.

    glibc asks the system anew for each large tensor, whose pages must then be cleared: a fifth of a small model's step.
    Does nothing with another C library. Numbers: M_TRIM_THRESHOLD and M_MMAP_MAX of mallopt(3).
    """
    mallopt = _of_the_c_library("mallopt")
    if mallopt is not None:
        mallopt(-1, -1)
        mallopt(-4, 0)


def _of_the_c_library(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
