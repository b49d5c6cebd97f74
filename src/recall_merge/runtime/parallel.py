"""Threads that do not change results: every item runs on one thread, and the results come in order."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def cores() -> int:
    """How many processors this process may use; where the system cannot tell (macOS), how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process_wide(change: Callable[[], AbstractContextManager[None]]) -> Callable[[], AbstractContextManager[None]]:
    """A change to the whole process that threads share: the first one in makes it, the last one out undoes it."""
    lock, inside = threading.Lock(), list[AbstractContextManager[None]]()

    @contextmanager
    def shared() -> Iterator[None]:
        with lock:
            inside.append(inside[0] if inside else change())
            if len(inside) == 1:
                inside[0].__enter__()
        try:
            yield
        finally:
            with lock:
                made = inside.pop()
                if not inside:
                    made.__exit__(None, None, None)

    return shared


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside the block, each of torch's operations runs on one thread."""
    import torch

    with _number_kept():
        torch.set_num_threads(1)
        yield


@process_wide
@contextmanager
def _number_kept() -> Iterator[None]:
    """torch's number of threads, put back. MKL has one number for all threads: nobody else may still rely on one."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def in_order(function: Callable[[T], R], items: Iterable[T], threads: int) -> Generator[R, None, None]:
    """Like `map`, with up to `threads` items in work and as many finished and waiting, which bounds the memory.

    Each item's arithmetic runs on a single thread (no parallel sums inside an operation), so the bytes of the results
    depend neither on `threads` nor on the machine's number of cores.
    """
    import torch

    with one_thread():
        if threads == 1:
            yield from map(function, items)
            return
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            waiting: deque[Future[R]] = deque()
            try:
                for item in items:
                    waiting.append(pool.submit(function, item))
                    if len(waiting) >= 2 * threads:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()
