"""Tasks on the nodes of a Ray cluster. Tasks of a lost node or worker run again elsewhere; files are where all nodes see them."""

from __future__ import annotations

import logging
import os
import pickle
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from recall_merge.runtime.errors import ExecutorError

R = TypeVar("R")
RETRIES = 3  # of a task whose worker or node was lost; after that, the task itself is likely to kill them
STORE = 10**8  # bytes of Ray's object store if we start Ray: models stay in files, and tasks pass their paths
ENDING = 30.0  # seconds to wait for cancelled tasks to end
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


class Cluster:
    """An executor that runs tasks anywhere on the cluster."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._task = ray.remote(max_retries=RETRIES)(_call)
        self._running: dict[Future[Any], Any] = {}

    @property
    def slots(self) -> int:
        return max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def submit(self, label: str, function: Callable[..., R], *arguments: Any, memory: int = 0, threads: int = 1) -> Future[R]:
        self._check_fits(label, memory, "bytes of memory", "memory", "--memory")
        self._check_fits(label, threads, "processors", "CPU", "--num-cpus")
        done: Future[R] = Future()
        task = self._task.options(name=label, num_cpus=threads, memory=memory or None, scheduling_strategy="SPREAD")
        reference = task.remote(Path.cwd(), function, arguments)
        self._running[done] = reference

        def finish(answer: Future[Any]) -> None:
            self._running.pop(done, None)
            if (lost := answer.exception()) is not None:
                not_started = isinstance(lost, self._ray.exceptions.RayTaskError)  # a node that could not even load the function
                what = f"'{label}' was given up: {_lines(lost)[-1 if not_started else 0]}"
                fix = "install the same recall-merge on every node" if not_started else "look at the memory of the nodes"
                fix += "; then run this again: finished work is kept"
                done.set_exception(ExecutorError(what, where="--executor", fix=fix))
                return
            raised, value = answer.result()
            done.set_exception(raised) if raised is not None else done.set_result(value)

        reference.future().add_done_callback(finish)
        return done

    def _check_fits(self, label: str, needed: int, unit: str, resource: str, flag: str) -> None:
        """Refuse a task that no node can hold: Ray would wait for such a node forever."""
        largest = int(max((node["Resources"].get(resource, 0) for node in self._ray.nodes() if node["Alive"]), default=0))
        if needed > largest:
            what = f"'{label}' needs up to {needed:,} {unit}; the largest node of the cluster gives {largest:,}"
            raise ExecutorError(what, where="--executor", fix=f"add a larger node, or start its `ray start` with a larger {flag}")

    def cancel(self) -> None:
        """Cancel the running tasks, and wait until they have ended: they might still be writing."""
        running = dict(self._running)
        for reference in running.values():
            self._ray.cancel(reference, force=True)
        wait(running, ENDING)


@contextmanager
def ray_executor(address: str | None, workers: int) -> Iterator[Cluster]:
    """Ray, started on this machine with `workers` processes, or the cluster at an address (`auto`: this machine's cluster)."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    options: dict[str, Any] = {"address": address, "include_dashboard": None}
    if address is None:
        options = {"address": "local", "num_cpus": workers, "object_store_memory": STORE, "include_dashboard": False}
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        fix = "give the address of its head, as `ray start --head` prints it, or `ray://auto` on one of its nodes"
        raise ExecutorError(f"there is no cluster: {_lines(error)[0]}", where="--executor", fix=fix) from error
    executor = Cluster(ray)
    try:
        yield executor
    except BaseException:
        executor.cancel()
        raise
    finally:
        ray.shutdown()


def _call(folder: Path, function: Callable[..., R], arguments: tuple[Any, ...]) -> tuple[BaseException | None, R | None]:
    """Run a task on a worker, in the same folder. What it raises is returned, so that Ray itself reports lost workers only."""
    import torch

    with suppress(OSError):
        os.chdir(folder)
    torch.set_num_threads(1)
    try:
        return None, function(*arguments)
    except Exception as error:
        error.add_note(f"on a worker:\n{traceback.format_exc()}")
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return RuntimeError(f"{type(error).__name__}: {error}"), None
        return error, None


def _lines(error: BaseException) -> list[str]:
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
