"""Tasks that come with lm-eval: whether a name is one of them, and lm-eval's own objects for them."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any

from recall_merge.evaluation.tasks import TaskSpec
from recall_merge.runtime.errors import DataError, Faults


def check_named(tasks: Sequence[TaskSpec]) -> Faults:
    """What is wrong with the names of tasks that should come with lm-eval."""
    faults = Faults()
    for task in (task for task in tasks if task.rows is None):
        index = task_manager().task_index
        if task.name not in index:
            close = get_close_matches(task.name, index, n=1)
            fix = (f"did you mean '{close[0]}'? " if close else "") + "`lm_eval ls tasks` lists them; rows are given as a file"
            faults.add(f"lm-eval has no task '{task.name}', and there is no such file", fix=fix)
        elif index[task.name].tags and index[task.name].yaml_path is None:
            members = ", ".join(sorted(index[task.name].tags))
            faults.add(f"'{task.name}' is a tag of several of lm-eval's tasks", fix=f"name one or more of them: {members}")
    return faults


def load_named(tasks: Sequence[TaskSpec]) -> dict[str, Any]:
    """lm-eval's objects for tasks and groups, which fetch their data when they are made."""
    if not tasks:
        return {"tasks": {}, "groups": {}}
    names = [task.name for task in tasks]
    try:
        return task_manager().load(names)
    except Exception as error:  # the hub, `datasets` and a task's own code each raise their own
        what = f"lm-eval cannot load its tasks: {' '.join(str(error).split())}"
        raise DataError(what, where=", ".join(names), fix="their data come from the hub: is there a network?") from error


@cache
def task_manager() -> Any:
    """lm-eval's list of tasks; making it reads some ten thousand files."""
    from lm_eval.tasks import TaskManager

    return TaskManager()
