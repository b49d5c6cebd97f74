"""What each measurement has to reach, in one place, and a figure as it stands beside its bar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Bar:
    """What is asked of a figure: at least, or at most, so much of a unit; `work` says what is measured."""

    work: str
    kind: str
    limit: float
    unit: str

    def met(self, value: float) -> bool:
        return value >= self.limit if self.kind == "at least" else value <= self.limit

    def __str__(self) -> str:
        return f"{self.kind} {self.limit:g} {self.unit}"


PEER = "mergekit 0.1.5"
BARS = {
    "linear.float32.whole": Bar(f"linear, whole process, against {PEER}", "at least", 1.5, "x as fast"),
    "linear.float32.inside": Bar(f"linear, after imports, against {PEER}", "at least", 3.0, "x as fast"),
    "linear.bfloat16.whole": Bar(f"linear, whole process, against {PEER}", "at least", 1.5, "x as fast"),
    "linear.bfloat16.inside": Bar(f"linear, after imports, against {PEER}", "at least", 2.0, "x as fast"),
    "linear.memory": Bar("linear, peak anonymous memory", "at most", 0.5, "GB"),
    "linear.executor": Bar(
        "linear, checks and hashes off, against `cat` of the inputs and `cp` of one output", "at most", 2.0, "x the time"
    ),
    "linear.checked": Bar("linear, after imports, against `cat` of the inputs and `cp` of one output", "at most", 3.0, "x the time"),
    "ties.linear": Bar("ties, density 0.2, after imports, against our linear", "at most", 2.5, "x the time"),
    "ties.peer": Bar(f"ties, density 0.2, after imports, against {PEER}", "at least", 15.0, "x as fast"),
    "tensors.time": Bar("tiny tensors, after imports", "at most", 5.0, "s"),
    "tensors.growth": Bar("time a tensor, against that with 3,603", "at most", 1.2, "x the time"),
    "recall.bytes": Bar("recall, bytes read of: base and experts once, the newest once more", "at most", 1.05, "x"),
    "recall.bytes.experts": Bar("the same, the base not counted in what has to be read", "at most", 1.05, "x"),
    "recall.memory": Bar("recall, peak anonymous memory of: experts x largest block + hidden states + 0.6 GB", "at most", 1.0, "x"),
    "recall.layer": Bar("recall, peak anonymous memory with twice the layer", "at most", 1.2, "x"),
    "recall.time": Bar("recall, after imports, against plain forward passes and our linear", "at most", 1.2, "x the time"),
    "large.plan": Bar("`recall plan`: the memory that it tells", "at most", 16.0, "GB"),
    "large.memory": Bar("recall, peak anonymous memory of the first 4 blocks", "at most", 16.0, "GB"),
    "startup.help": Bar("`recall --help`, whole process", "at most", 0.4, "s"),
}


@dataclass(frozen=True)
class Figure:
    """One line of the results.

    Attributes:
        work: what is measured, where no bar says it.
        case: on what.
        values: one a pair of runs, or one alone.
        unit: of the values, where no bar says it.
        ours, other: seconds or gigabytes behind the values, run by run.
        note: what a reader should know.
    """

    bar: str | None
    case: str
    values: Sequence[float]
    ours: Sequence[float] = ()
    other: Sequence[float] = ()
    note: str = ""
    work: str = ""
    unit: str = ""
    quick: bool = field(default=False, kw_only=True)

    def told(self) -> dict[str, Any]:
        """For the JSON file: with what was asked and whether it was met, so that the file can be read alone."""
        bar = BARS.get(self.bar or "")
        value = median(self.values)
        return {
            "work": bar.work if bar else self.work,
            "case": self.case,
            "median": value,
            "min": min(self.values),
            "max": max(self.values),
            "values": list(self.values),
            "unit": bar.unit if bar else self.unit,
            "bar": str(bar) if bar else None,
            "met": bar.met(value) if bar else None,
            "ours": list(self.ours),
            "other": list(self.other),
            "note": self.note,
        }


def short(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def line(told: dict[str, Any]) -> str:
    """A figure in words: median, span, bar."""
    runs = len(told["values"])
    spread = f" ({short(told['min'])} to {short(told['max'])}, {runs} pairs)" if runs > 1 else ""
    judged = "" if told["bar"] is None else f"; {told['bar']}: {'met' if told['met'] else 'MISSED'}"
    behind = [f"{who} {short(median(told[who]))}" for who in ("ours", "other") if told[who]]
    more = "".join(f" [{', '.join(part)}]" for part in (behind, [told["note"]]) if part and part[0])
    return f"{told['case']}: {told['work']}: {short(told['median'])} {told['unit']}{spread}{judged}{more}"
