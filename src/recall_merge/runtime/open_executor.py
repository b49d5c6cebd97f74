"""The executor that `--executor` names: processes on this machine, or Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from recall_merge.runtime.errors import RunError
from recall_merge.runtime.executor import Executor

LOCAL, RAY = "local", "ray"


def check_executor(name: str) -> None:
    """Check that a name is `local`, `ray` or `ray://ADDRESS`.

    Raises:
        RunError: if it is none of them.
        MissingExtra: if it is Ray, which is not installed.
    """
    if name == RAY or name.startswith(f"{RAY}://"):
        from recall_merge.runtime.ray_cluster import check_installed

        check_installed()
    elif name != LOCAL:
        raise RunError(f"there is no executor '{name}'", where="--executor", fix="give local, ray, or ray://ADDRESS")


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
