"""Work done ahead of its use, in threads: decoding the next pictures while the present one is encoded, the next batches
while the present one is trained on.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch

Item = TypeVar("Item")
Made = TypeVar("Made")


def threads() -> int:
    """As many as the processor runs, at most 4: each may hold a decoded picture."""
    return min(4, os.cpu_count() or 1)


def ahead(make: Callable[[Item], Made], items: Sequence[Item], workers: int | None = None) -> Iterator[Made]:
    """make(item) of each item, in order; at most two results a worker wait for their use.

    An exception of `make` is raised in its turn; work that has not begun is then given up.
    """
    count = workers or threads()
    pool = ThreadPoolExecutor(count)
    rest, waiting = iter(items), deque[Future[Made]]()
    try:
        waiting.extend(pool.submit(make, item) for item in islice(rest, 2 * count))
        while waiting:
            done = waiting.popleft().result()
            waiting.extend(pool.submit(make, item) for item in islice(rest, 1))
            yield done
    finally:
        pool.shutdown(cancel_futures=True)


def running_ahead(items: Iterator[Made], by: int = 2) -> Iterator[Made]:
    """The same items in the same order, made up to `by` ahead of their use by one thread, on one core.

    Threads of PyTorch that wait for work spin, and would take the cores from the step that is being computed.
    """
    pool, end = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)), object()

    def following() -> Made | object:
        return next(items, end)

    waiting = deque(pool.submit(following) for _ in range(by))
    try:
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(following))
            yield item  # type: ignore[misc]
    finally:
        pool.shutdown(cancel_futures=True)
