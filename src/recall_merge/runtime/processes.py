"""Processes of one thread each, side by side: on a CPU they train and score faster than one process of many threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from typing import Any, TypeVar

from recall_merge.runtime.progress import Advance, Progress

R = TypeVar("R")


def side_by_side(function: Callable[..., R], calls: Sequence[tuple[Any, ...]], workers: int, progress: Progress) -> list[R]:
    """`function(*call, progress)` for every call, up to `workers` at a time; the results in the order of the calls.

    Function, arguments and results must be such that they can be pickled; what one call raises is raised here, when the others are
    done. Each process has one thread, so a result does not depend on `workers`; what they tell of their progress is told on here.
    """
    context = get_context("spawn")  # subtle: forking a process that has run torch's threads may hang
    with context.Manager() as manager, ExitStack() as stack:
        told = manager.Queue()
        listener = threading.Thread(target=_tell_on, args=(told, progress))
        listener.start()
        stack.callback(listener.join)
        stack.callback(told.put, None)
        with ProcessPoolExecutor(min(workers, len(calls)) or 1, mp_context=context, initializer=_one_thread) as pool:
            futures = [pool.submit(_call, function, call, told, number) for number, call in enumerate(calls)]
        return [future.result() for future in futures]


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _call(function: Callable[..., R], call: tuple[Any, ...], told: Any, number: int) -> R:
    return function(*call, _Teller(told, number))


class _Teller:
    """Sends what it hears to the process that started this one."""

    def __init__(self, told: Any, number: int) -> None:
        self._told, self._number = told, number

    @contextmanager
    def stage(self, label: str, total: int, unit: str) -> Iterator[Advance]:
        self._told.put((self._number, "begin", (label, total, unit)))
        try:
            yield lambda amount: self._told.put((self._number, "advance", amount))
        finally:
            self._told.put((self._number, "end", None))


def _tell_on(told: Any, progress: Progress) -> None:
    """Replay the stages of all processes; of one process, one stage lies in another or after it."""
    opened: dict[int, list[tuple[Any, Advance]]] = {}
    while (event := told.get()) is not None:
        number, kind, what = event
        stages = opened.setdefault(number, [])
        if kind == "begin":
            stage = progress.stage(*what)
            stages.append((stage, stage.__enter__()))
        elif kind == "advance":
            stages[-1][1](what)
        else:
            stages.pop()[0].__exit__(None, None, None)
