"""Where tasks run: one interface, and the executor that `--executor` names: processes on this machine, or a Ray cluster."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from recall_merge.runtime.device import AUTO, CPU
from recall_merge.runtime.errors import MissingExtra, RunError

R = TypeVar("R")
PATIENCE = 10.0  # seconds after which code that waits for tasks checks whether a cluster has grown
LOCAL, RAY = "local", "ray"


class Executor(Protocol):
    """Runs tasks, each with its sums on one thread, so that results do not depend on the executor.

    A task is a function of a module, with arguments that can be pickled. An exception that it raises is raised by its future.
    """

    @property
    def slots(self) -> int:
        """How many tasks run at a time; on a cluster this may change during the work."""
        ...

    def submit(self, label: str, function: Callable[..., R], *arguments: Any, memory: int = 0, threads: int = 1) -> Future[R]:
        """Start a task.

        Args:
            label: its name in messages.
            memory: the most bytes that it needs; tasks that do not fit into a node's memory together wait for one another.
            threads: processors that it uses, likewise.
        """
        ...


def check_executor(name: str) -> None:
    """Raises RunError if a name is not `local`, `ray` or `ray://ADDRESS`; MissingExtra if it is Ray, which is not installed."""
    if name == RAY or name.startswith(f"{RAY}://"):
        if importlib.util.find_spec("ray") is None:
            raise MissingExtra("cluster", "`--executor ray`")
    elif name != LOCAL:
        raise RunError(f"there is no executor '{name}'", where="--executor", fix="give local, ray, or ray://ADDRESS")


def device_of_tasks(executor: str, device: str | None) -> str | None:
    """The device that was asked for, and on a cluster the processor. Raises RunError if an accelerator is asked for there."""
    if executor == LOCAL:
        return device
    if device not in (None, AUTO, CPU):
        what = f"tasks of `--executor {executor}` run on processors, not on '{device}'"
        raise RunError(what, where="device", fix="leave out `device`, or `--executor`")
    return CPU


@contextmanager
def open_executor(name: str, workers: int) -> Iterator[Executor]:
    """Open an executor; if the block raises, tasks that have not started are cancelled.

    Args:
        name: `local`; `ray`, which starts Ray on this machine; `ray://ADDRESS`, a cluster that this machine is a node of.
        workers: processes of `local`, or of a Ray that is started here; a cluster has as many as it has processors.
    """
    check_executor(name)
    if name == LOCAL:
        from recall_merge.runtime.processes import local_executor

        opened = local_executor(workers)
    else:
        from recall_merge.runtime.ray_cluster import ray_executor

        opened = ray_executor(name.removeprefix(RAY).removeprefix("://") or None, workers)
    with opened as executor:
        yield executor
