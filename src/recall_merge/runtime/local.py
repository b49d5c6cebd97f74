"""Processes of one thread each on this machine; a single worker is this process itself."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

from recall_merge.runtime.executor import Executor

R = TypeVar("R")


class Here:
    """Tasks are done as they come, in this process; on one thread, as everywhere: a training gives other bytes on two."""

    slots = 1

    def submit(self, label: str, function: Callable[..., R], *arguments: Any, memory: int = 0, threads: int = 1) -> Future[R]:
        import torch

        done: Future[R] = Future()
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            done.set_result(function(*arguments))
        except Exception as error:
            done.set_exception(error)
        finally:
            torch.set_num_threads(before)
        return done


class Processes:
    """Tasks in a pool of processes."""

    def __init__(self, pool: ProcessPoolExecutor, slots: int) -> None:
        self._pool, self.slots = pool, slots

    def submit(self, label: str, function: Callable[..., R], *arguments: Any, memory: int = 0, threads: int = 1) -> Future[R]:
        return self._pool.submit(function, *arguments)


@contextmanager
def local_engine(workers: int) -> Iterator[Executor]:
    """Processes of one thread each: two of them do more on two cores than one with two threads."""
    if workers == 1:
        yield Here()
        return
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # subtle: it is read when torch is first loaded, so each process must be started with it
    try:
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_begin)
        try:
            yield Processes(pool, workers)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        pool.shutdown()
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _begin() -> None:
    """Of each process: one thread, and an end when the process that started it ends, however that ends."""
    import torch

    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
