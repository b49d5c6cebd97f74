"""Tasks on the nodes of a Ray cluster. What a lost node or worker was doing is done again elsewhere; files lie where all nodes see them."""

from __future__ import annotations

import importlib.util
import logging
import os
import pickle
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from recall_merge.runtime.errors import EngineError, MissingExtra
from recall_merge.runtime.executor import Executor

R = TypeVar("R")
RETRIES = 3  # of a task whose worker or node was lost; more than that, and it is likely the task that kills them
STORE = 10**8  # bytes of Ray's object store where we start it: models lie in files, and only words travel
ENDING = 30.0  # seconds within which workers that are told to end do so
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


def check_installed() -> None:
    """Raises: MissingExtra: without Ray."""
    if importlib.util.find_spec("ray") is None:
        raise MissingExtra("cluster", "`--executor ray`")


class Cluster:
    """Tasks anywhere on the cluster."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._task = ray.remote(max_retries=RETRIES)(_call)
        self._at_work: dict[Future[Any], Any] = {}

    @property
    def slots(self) -> int:
        return max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    def submit(self, label: str, function: Callable[..., R], *arguments: Any, memory: int = 0, threads: int = 1) -> Future[R]:
        self._check_fits(label, memory, "bytes of memory", "memory", "--memory")
        self._check_fits(label, threads, "processors", "CPU", "--num-cpus")
        told: Future[R] = Future()
        task = self._task.options(name=label, num_cpus=threads, memory=memory or None, scheduling_strategy="SPREAD")
        reference = task.remote(Path.cwd(), function, arguments)
        self._at_work[told] = reference

        def finish(found: Future[Any]) -> None:
            self._at_work.pop(told, None)
            if (lost := found.exception()) is not None:
                here = isinstance(lost, self._ray.exceptions.RayTaskError)  # a node that could not even begin
                what = f"'{label}' was given up: {_lines(lost)[-1 if here else 0]}"
                fix = "install the same recall-merge on every node" if here else "look at the memory of the nodes"
                fix += "; what is done stays done: run this again"
                told.set_exception(EngineError(what, where="--executor", fix=fix))
                return
            raised, value = found.result()
            told.set_exception(raised) if raised is not None else told.set_result(value)

        reference.future().add_done_callback(finish)
        return told

    def _check_fits(self, label: str, needed: int, unit: str, resource: str, flag: str) -> None:
        """Refuse what no node can hold: Ray would wait for one for ever."""
        largest = int(max((node["Resources"].get(resource, 0) for node in self._ray.nodes() if node["Alive"]), default=0))
        if needed > largest:
            what = f"'{label}' needs up to {needed:,} {unit}; the largest node of the cluster gives {largest:,}"
            raise EngineError(what, where="--executor", fix=f"add a larger node, or start its `ray start` with a larger {flag}")

    def give_up(self) -> None:
        """End what is at work, and wait until it has ended: it might still be writing."""
        left = dict(self._at_work)
        for reference in left.values():
            self._ray.cancel(reference, force=True)
        wait(left, ENDING)


@contextmanager
def ray_engine(address: str | None, workers: int) -> Iterator[Executor]:
    """Ray, started on this machine with so many workers, or the cluster at an address (`auto`: the one that this machine is a node of)."""
    check_installed()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    told: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": None}
    if address is None:
        told |= {"address": "local", "num_cpus": workers, "object_store_memory": STORE, "include_dashboard": False}
    else:
        told |= {"address": address}
    try:
        ray.init(**told)
    except (ConnectionError, RuntimeError, ValueError) as error:
        fix = "give the address of its head, as `ray start --head` prints it, or `ray://auto` on one of its nodes"
        raise EngineError(f"there is no cluster: {_lines(error)[0]}", where="--executor", fix=fix) from error
    executor = Cluster(ray)
    try:
        yield executor
    except BaseException:
        executor.give_up()
        raise
    finally:
        ray.shutdown()


def _call(folder: Path, function: Callable[..., R], arguments: tuple[Any, ...]) -> tuple[BaseException | None, R | None]:
    """Do a task, on a worker. What it raises comes back as it is: only lost workers are Ray's to tell of.

    Args:
        folder: from which relative paths are meant; where it is not on this machine, they will not be found either.
    """
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
