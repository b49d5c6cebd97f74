"""Processes of one thread each on this machine: on two cores, two of them do more than one process with two threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

from recall_merge.runtime.parallel import one_thread
from recall_merge.runtime.progress import Advance, Progress

R = TypeVar("R")


class ThisProcess:
    """An executor that runs each task at once, in this process; on one thread, because training gives other bytes on two."""

    slots = 1

    def submit(self, label: str, function: Callable[..., R], *arguments: Any, memory: int = 0, threads: int = 1) -> Future[R]:
        done: Future[R] = Future()
        try:
            with one_thread():
                done.set_result(function(*arguments))
        except Exception as error:
            done.set_exception(error)
        return done


class Processes:
    """An executor that runs tasks in a pool of `slots` processes."""

    def __init__(self, pool: ProcessPoolExecutor, slots: int) -> None:
        self._pool, self.slots = pool, slots

    def submit(self, label: str, function: Callable[..., R], *arguments: Any, memory: int = 0, threads: int = 1) -> Future[R]:
        return self._pool.submit(function, *arguments)


@contextmanager
def local_executor(workers: int) -> Iterator[ThisProcess | Processes]:
    """An executor on this machine; a single worker is this process."""
    if workers == 1:
        yield ThisProcess()
    else:
        with process_pool(workers) as pool:
            yield Processes(pool, workers)


@contextmanager
def process_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of new processes of one thread each. If the block raises, calls that have not started are cancelled."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # subtle: read when torch is first loaded, so each process must be started with it
    try:  # subtle: forking a process that has run torch's threads may hang
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_begin) as pool:
            try:
                yield pool
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _begin() -> None:
    """Give a new process one thread, and end it when the process that started it ends, however that happens."""
    import torch

    torch.set_num_threads(1)
    parent = parent_process()
    assert parent is not None

    def end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def side_by_side(function: Callable[..., R], calls: Sequence[tuple[Any, ...]], workers: int, progress: Progress) -> list[R]:
    """`function(*call, progress)` for every call, up to `workers` at a time; the results are in the order of the calls.

    Function, arguments and results must be picklable. An exception is raised here once the other calls are done. Each process has one
    thread, so results do not depend on `workers`. Progress of the processes is passed on to `progress`.
    """
    with get_context("spawn").Manager() as manager, ExitStack() as stack:
        events = manager.Queue()
        listener = threading.Thread(target=_replay, args=(events, progress))
        listener.start()
        stack.callback(listener.join)
        stack.callback(events.put, None)
        with process_pool(min(workers, len(calls)) or 1) as pool:
            futures = [pool.submit(function, *call, _Sender(events, number)) for number, call in enumerate(calls)]
        return [future.result() for future in futures]


class _Sender:
    """Progress of a process, sent to the process that started it."""

    def __init__(self, events: Any, number: int) -> None:
        self._events, self._number = events, number

    @contextmanager
    def stage(self, label: str, total: int, unit: str) -> Iterator[Advance]:
        self._events.put((self._number, "begin", (label, total, unit)))
        try:
            yield lambda amount: self._events.put((self._number, "advance", amount))
        finally:
            self._events.put((self._number, "end", None))


def _replay(events: Any, progress: Progress) -> None:
    """Replay the stages of all processes; the stages of one process nest or follow one another."""
    opened: dict[int, list[tuple[Any, Advance]]] = {}
    while (event := events.get()) is not None:
        number, kind, content = event
        stages = opened.setdefault(number, [])
        if kind == "begin":
            stage = progress.stage(*content)
            stages.append((stage, stage.__enter__()))
        elif kind == "advance":
            stages[-1][1](content)
        else:
            stages.pop()[0].__exit__(None, None, None)
