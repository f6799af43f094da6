"""Work done ahead of need, in threads: decoders, scalers and files let other threads run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

In = TypeVar("In")
Out = TypeVar("Out")


def ahead(function: Callable[[In], Out], items: Iterable[In], workers: int, depth: int) -> Iterator[Out]:
    """`map(function, items)`, in order, by `workers` threads, at most `depth` results ahead of the one that is asked for."""
    pool = ThreadPoolExecutor(workers, "decode")
    waiting: deque[Future[Out]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
