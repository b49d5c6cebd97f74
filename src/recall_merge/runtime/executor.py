"""What an executor is: tasks in, futures out. One implementation is local, the other is Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from recall_merge.runtime.errors import RunError

R = TypeVar("R")
LOCAL, RAY = "local", "ray"
PATIENCE = 10.0  # seconds after which whoever waits for tasks looks whether a cluster has grown


class Executor(Protocol):
    """Runs tasks, each with its sums on one thread, so that results do not depend on the executor.

    A task is a function of a module with arguments that can be pickled. What it raises is what its future raises.
    """

    @property
    def slots(self) -> int:
        """How many tasks run at a time; on a cluster that may change while it works."""
        ...

    def submit(self, label: str, function: Callable[..., R], *arguments: Any, memory: int = 0, threads: int = 1) -> Future[R]:
        """Have a task done.

        Args:
            label: what it is, for people.
            memory: bytes that it needs at most; tasks that would not fit into a node's memory together wait for one another.
            threads: processors that it uses, likewise.
        """
        ...


def check_executor(words: str) -> None:
    """Check `local`, `ray` or `ray://ADDRESS`.

    Raises:
        RunError: if it is none of them.
        MissingExtra: if it is Ray, which is not installed.
    """
    if words == RAY or words.startswith(f"{RAY}://"):
        from recall_merge.runtime.ray_cluster import check_installed

        check_installed()
    elif words != LOCAL:
        raise RunError(f"there is no executor '{words}'", where="--executor", fix="give local, ray, or ray://ADDRESS")


@contextmanager
def open_executor(words: str, workers: int) -> Iterator[Executor]:
    """The executor of `--executor`; when it is left in the middle, tasks that have not begun are given up.

    Args:
        words: `local`; `ray`, which starts Ray on this machine; `ray://ADDRESS`, a cluster, where this is run on one of its nodes.
        workers: processes, of `local` and of a Ray that is started here; a cluster has as many as it has processors.
    """
    check_executor(words)
    if words == LOCAL:
        from recall_merge.runtime.local import local_engine as opened
    else:
        from recall_merge.runtime.ray_cluster import ray_engine

        with ray_engine(words.removeprefix(RAY).removeprefix("://") or None, workers) as executor:
            yield executor
        return
    with opened(workers) as executor:
        yield executor
