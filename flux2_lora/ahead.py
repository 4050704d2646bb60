"""Work done ahead of its use, in threads: decoding the next pictures while the present one is encoded."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

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
