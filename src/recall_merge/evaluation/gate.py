"""Conditions that a model's scores must meet: `french>=0.6`, or against the model before `french>=-0.02`; `all` is every task.

A condition is decided by the score itself. The interval beside it, a bootstrap over test items, says how sure that decision is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recall_merge.runtime.errors import Faults, RunError, did_you_mean

ALL = "all"
_FORM = re.compile(r"\s*(?P<task>\S.*?)\s*>=\s*(?P<sign>[+-]?)(?P<number>\d+(\.\d*)?|\.\d+)\s*")
FORM = "write TASK>=0.6 for a score, TASK>=-0.02 for a change against the model before (with its sign), or all>=.. for every task"


@dataclass(frozen=True)
class Condition:
    """A lower bound of a task's score, or of its change."""

    task: str  # or ALL
    bound: float
    is_change: bool  # against the model before; else of the score itself

    def __str__(self) -> str:
        return f"{self.task}>={self.bound:+g}" if self.is_change else f"{self.task}>={self.bound:g}"


@dataclass(frozen=True)
class Decision:
    """One task under one condition."""

    condition: str
    task: str
    value: float  # the score, or its change
    low: float  # of its 95 % interval over test items; NaN where there is none
    high: float
    holds: bool

    @property
    def words(self) -> str:
        """The decision in words, with its interval, and whether another draw of test items could turn it."""
        number = f"{self.value:+.3f}" if _is_change(self.condition) else f"{self.value:.3f}"
        bound = self.condition.partition(">=")[2]
        told = f"{self.task} {number} {'>=' if self.holds else 'is below'} {bound}"
        if math.isnan(self.low):
            return told
        sure = self.low >= float(bound) if self.holds else self.high < float(bound)
        return f"{told} [{self.low:.3f}, {self.high:.3f}]{'' if sure else ', within the error over test items'}"


def read_conditions(words: Sequence[str], tasks: Collection[str], *, where: str, before: Collection[str] | None = None) -> list[Condition]:
    """Conditions on the scores of some tasks.

    Args:
        before: the tasks that the model before is scored on too; None where there is no model before.

    Raises:
        RunError: with every condition that cannot be read or decided, and all that contradict each other.
    """
    faults, found = Faults(), dict[tuple[str, bool], Condition]()
    for word in words:
        if (form := _FORM.fullmatch(word)) is None:
            faults.add(f"'{word}' is no condition", where=where, fix=FORM)
            continue
        condition = Condition(form["task"], float(form["sign"] + form["number"]), bool(form["sign"]))
        for what, fix in _wrong(condition, tasks, before):
            faults.add(f"{word}: {what}", where=where, fix=fix)
        other = found.setdefault((condition.task, condition.is_change), condition)
        if other.bound != condition.bound:
            faults.add(f"{other} and {condition} are two bounds of the same", where=where, fix="keep one of them")
    faults.raise_any(RunError)
    return list(found.values())


def _wrong(condition: Condition, tasks: Collection[str], before: Collection[str] | None) -> Iterator[tuple[str, str]]:
    """What is wrong with a condition, and how to mend it."""
    if not abs(condition.bound) <= 1:
        yield "scores and their changes lie between -1 and 1", "give the bound as a share, as 0.6 for 60 %"
    if condition.task == ALL and ALL in tasks:
        yield "a task is named `all`, and the word stands for every task", "name each task"
    if condition.task not in {ALL, *tasks}:
        yield "there is no such task", did_you_mean(condition.task, [*tasks, ALL])
    elif condition.is_change and before is None:
        yield "there is no model before, against which its score could change", "give a score, without a sign"
    elif condition.is_change and condition.task != ALL and condition.task not in (before or ()):
        yield "the model before is not scored on this task", "give a score, without a sign"


def decide(conditions: Sequence[Condition], scores: Mapping[str, Any], before: Mapping[str, Any]) -> list[Decision]:
    """Every task under every condition on it.

    scores, before: by task a score as `TaskScore` has it in JSON, of the model and of the one before. Of `all`, a change is that of the
    tasks which both are scored on.
    """
    return [
        _decided(condition, task, scores[task], before[task] if condition.is_change else None)
        for condition in conditions
        for task in (scores if condition.task == ALL else [condition.task])
        if not condition.is_change or task in before
    ]


def _decided(condition: Condition, task: str, score: Mapping[str, Any], before: Mapping[str, Any] | None) -> Decision:
    value = score["score"] - (before["score"] if before else 0.0)
    low, high = _interval(value, score["items"], before["items"] if before else None)
    return Decision(str(condition), task, value, low, high, holds=value >= condition.bound)


def _interval(value: float, items: Sequence[Mapping[str, Any]], before: Sequence[Mapping[str, Any]] | None) -> tuple[float, float]:
    """The 95 % interval of a score or a change over test items, the same items before and after; NaN where items have no scores."""
    from recall_merge.maths.bootstrap import bootstrap

    now = {item["id"]: item["score"] for item in items if item["score"] is not None}
    was = {item["id"]: item["score"] for item in before if item["score"] is not None} if before is not None else dict.fromkeys(now, 0.0)
    shared = [name for name in now if name in was]
    if len(shared) < 2:
        return math.nan, math.nan
    found = bootstrap(lambda samples: float(samples[0].mean()), [[now[name] - was[name] for name in shared]])
    return value + found.low - found.estimate, value + found.high - found.estimate


def _is_change(condition: str) -> bool:
    return condition.partition(">=")[2][0] in "+-"
