"""What an executor is: tasks in, futures out. One implementation is local (`processes.py`), the other is Ray (`ray_cluster.py`)."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

R = TypeVar("R")
PATIENCE = 10.0  # seconds after which code that waits for tasks checks whether a cluster has grown


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
