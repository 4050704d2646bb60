"""Ways to bring a block's bytes into a slot of the device, behind one Protocol.

Law: a copy begins when the device has done all that it was given before `submit`, so a slot may be handed out again as
soon as the last work on it was given; and what is given after `wait` finds the bytes there. The host waits for neither:
on CUDA (and ROCm, which has the same calls) copies run on a stream of their own and events order the two; the slots are
recorded there, so that memory which is given back while a copy is on its way goes to nobody before the copy ended.
Where there are no streams, `submit` copies at once, in the one order that everything has there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from typing import Protocol

import torch
from torch import Tensor

from flux2_lora.host import Host


class Copier(Protocol):
    """Fills slots, by number, with blocks, by number."""

    def submit(self, slot: int, block: int) -> None:
        """Fill the slot once the device has done all that it was given so far."""

    def wait(self, slot: int) -> None:
        """Let the device's later work begin after the last copy into the slot."""


class AtOnce:
    """Copies in `submit`. buffer: host memory on the way, for a host that cannot fill the device's own."""

    def __init__(self, host: Host, slots: Sequence[Tensor], buffer: Tensor | None = None) -> None:
        self._host, self._slots, self._buffer = host, slots, buffer

    def submit(self, slot: int, block: int) -> None:
        if self._buffer is None:
            self._host.read(block, self._slots[slot])
        else:
            size = self._host.read(block, self._buffer)
            self._slots[slot][:size].copy_(self._buffer[:size])

    def wait(self, slot: int) -> None:
        """Nothing to wait for."""


class OnStream:
    """Copies from pinned host memory on a stream of their own."""

    def __init__(self, host: Host, slots: Sequence[Tensor]) -> None:
        self._host, self._slots, self._device = host, slots, slots[0].device
        self._stream = _stream_of(slots)
        self._done = [torch.cuda.Event() for _ in slots]

    def submit(self, slot: int, block: int) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._host.read(block, self._slots[slot])
        self._done[slot].record(self._stream)

    def wait(self, slot: int) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._done[slot])


class Staged:
    """Copies through two pinned buffers that a thread fills, from memory that is not pinned or from a file.

    The host waits in `wait` until the thread has begun the copy into the slot: an event that was not recorded yet would
    hold nothing up. What the thread meets, a disk that fails say, is raised there too.
    """

    def __init__(self, host: Host, slots: Sequence[Tensor], allocate: Callable[[int], Tensor]) -> None:
        """allocate: size -> pinned uint8 [size]."""
        self._host, self._slots, self._device = host, slots, slots[0].device
        self._stream = _stream_of(slots)
        self._done = [torch.cuda.Event() for _ in slots]
        self._buffers = cycle([(allocate(len(slots[0])), torch.cuda.Event()) for _ in range(2)])
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="copier")
        self._begun: dict[int, Future[None]] = {}

    def submit(self, slot: int, block: int) -> None:
        # An event of its own: recorded again, it would let a copy that was not begun yet wait for work that needs it.
        given = torch.cuda.Event()
        given.record(torch.cuda.current_stream(self._device))
        self._begun[slot] = self._thread.submit(self._copy, slot, block, given)

    def _copy(self, slot: int, block: int, given: torch.cuda.Event) -> None:
        buffer, free = next(self._buffers)
        free.synchronize()
        size = self._host.read(block, buffer)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(given)
            self._slots[slot][:size].copy_(buffer[:size], non_blocking=True)
            free.record(self._stream)
            self._done[slot].record(self._stream)

    def wait(self, slot: int) -> None:
        self._begun[slot].result()
        torch.cuda.current_stream(self._device).wait_event(self._done[slot])


def _stream_of(slots: Sequence[Tensor]) -> torch.cuda.Stream:
    """A stream that fills them."""
    stream = torch.cuda.Stream(slots[0].device)
    for slot in slots:
        slot.record_stream(stream)
    return stream
