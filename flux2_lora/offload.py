"""Inputs of recomputed blocks kept in host memory between forward and backward.

Law: offloading changes no number: bytes go out and come back as they are. An input goes while its block computes, and
is given up when the next block begins; in backward it comes back while the block behind it is differentiated. Copies
run on a stream of their own, in order, and events order it with computation: the host waits for nothing. Host memory is
taken in the first steps and kept. A block's inputs are found by the hooks that autograd offers for saved tensors; those
of `torch.utils.checkpoint` go through them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

_LEAST = 1 << 20  # bytes; modulation and the like are smaller, and shared by all blocks


class Copies(Protocol):
    """Copies between device and host, begun in the order in which they are asked for."""

    def copy(self, source: Tensor, target: Tensor) -> Any:
        """Copy once the device has done all that it was given so far; returns a mark of the end."""

    def wait(self, mark: Any) -> None:
        """Let the device's later work begin after a mark."""


class AtOnce:
    """On a device without streams."""

    def copy(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source)

    def wait(self, mark: None) -> None:
        """Nothing to wait for."""


class OnStream:
    """Of pinned host memory and a CUDA device, in both directions."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def copy(self, source: Tensor, target: Tensor) -> torch.cuda.Event:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        end = torch.cuda.Event()
        end.record(self._stream)
        return end

    def wait(self, mark: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(mark)


@dataclass(eq=False)
class _Call:
    """One run of a block in forward. before: the run that went before it, whose backward comes after."""

    before: Callable[[], _Call | None]
    inputs: list[weakref.ref[_Away]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class _Away:
    """An input in host memory, as autograd keeps it. device: where it computes."""

    host: Tensor
    device: torch.device
    call: _Call


class Offload:
    """Host memory for the inputs of blocks, and what brings them there and back."""

    def __init__(self, copies: Copies, allocate: Callable[[int], Tensor], least: int = _LEAST) -> None:
        """allocate: size -> uint8 [size] of host memory, pinned for `OnStream`; least: bytes of what is worth it."""
        self._copies, self._allocate, self._least = copies, allocate, least
        self._free: dict[int, list[Tensor]] = {}
        self._leaving: list[tuple[Tensor, Any]] = []
        self._coming: dict[_Away, tuple[Tensor, Any]] = {}
        self._latest: Callable[[], _Call | None] = lambda: None

    @contextmanager
    def inputs(self) -> Iterator[None]:
        """While active, which is to be for one block that is recomputed, what autograd saves is kept by the host."""
        self._settle(self._leaving)
        self._settle(list(self._coming.values()))  # of a graph that was dropped in the middle of its backward
        self._leaving, self._coming = [], {}
        call = _Call(before=self._latest)
        self._latest = weakref.ref(call)
        with saved_tensors_hooks(lambda tensor: self._out(tensor, call), self._back):
            yield

    def _out(self, tensor: Tensor, call: _Call) -> Tensor | _Away:
        if tensor.nbytes < self._least:
            return tensor
        free = self._free.setdefault(tensor.nbytes, [])
        flat = free.pop() if free else self._allocate(tensor.nbytes)
        source, host = tensor.detach().contiguous(), flat.view(tensor.dtype).view(tensor.shape)
        self._leaving.append((source, self._copies.copy(source, host)))
        away = _Away(host=host, device=tensor.device, call=call)
        weakref.finalize(away, free.append, flat).atexit = False
        call.inputs.append(weakref.ref(away))
        return away

    def _back(self, kept: Tensor | _Away) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        self._settle(self._leaving)
        self._leaving = []
        self._begin(kept)
        tensor, end = self._coming.pop(kept)
        self._copies.wait(end)
        before = kept.call.before()
        for away in [] if before is None else [one() for one in before.inputs]:
            if away is not None:
                self._begin(away)
        return tensor

    def _begin(self, away: _Away) -> None:
        if away not in self._coming:
            tensor = torch.empty_like(away.host, device=away.device)
            self._coming[away] = tensor, self._copies.copy(away.host, tensor)

    def _settle(self, copied: list[tuple[Tensor, Any]]) -> None:
        """Nobody is given the memory of these before they are copied."""
        for _, end in copied:
            self._copies.wait(end)
