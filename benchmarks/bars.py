"""What each measurement has to reach, and how a figure is shown beside its bar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Bar:
    """What a figure has to reach: at least, or at most, a limit in a unit; `work` says what is measured."""

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
    "linear.float32.whole": Bar(f"linear, whole process, against {PEER}", "at least", 2.0, "x as fast"),
    "linear.float32.processor": Bar(f"linear, processor seconds of the whole process, against {PEER}", "at least", 2.5, "x as few"),
    "linear.float32.inside": Bar(f"linear, after imports, against {PEER}", "at least", 3.0, "x as fast"),
    "linear.bfloat16.whole": Bar(f"linear, whole process, against {PEER}", "at least", 1.5, "x as fast"),
    "linear.bfloat16.inside": Bar(f"linear, after imports, against {PEER}", "at least", 2.0, "x as fast"),
    "linear.float32.memory": Bar("linear, peak anonymous memory", "at most", 0.35, "GB"),
    "linear.bfloat16.memory": Bar("linear, peak anonymous memory", "at most", 0.5, "GB"),
    "linear.pass": Bar("linear, checks and hashes off, against `cat` of the inputs and `cp` of one output", "at most", 2.0, "x the time"),
    "linear.checked": Bar("linear, after imports, against `cat` of the inputs and `cp` of one output", "at most", 3.0, "x the time"),
    "ties.linear": Bar("ties, density 0.2, after imports, against our linear", "at most", 2.5, "x the time"),
    "ties.peer": Bar(f"ties, density 0.2, after imports, against {PEER}", "at least", 15.0, "x as fast"),
    "tensors.time": Bar("tiny tensors, after imports", "at most", 5.0, "s"),
    "tensors.growth": Bar("time per tensor, against that with 3,603", "at most", 1.2, "x the time"),
    "recall.bytes": Bar("recall, bytes read, against base and experts once and the newest once more", "at most", 1.05, "x"),
    "recall.bytes.experts": Bar("the same, without counting the base", "at most", 1.05, "x"),
    "recall.memory": Bar("recall, peak anonymous memory, against experts x largest block + hidden states + 0.6 GB", "at most", 1.0, "x"),
    "recall.blocks": Bar("recall, peak anonymous memory with twice as many blocks", "at most", 1.2, "x"),
    "recall.time": Bar("recall, after imports, against plain forward passes and our linear", "at most", 1.2, "x the time"),
    "large.plan": Bar("`recall plan`: the memory it predicts for the merge", "at most", 16.0, "GB"),
    "large.memory": Bar("recall, peak anonymous memory of the first 4 blocks", "at most", 16.0, "GB"),
    "large.weights.plan": Bar("`recall weights`: the memory that the plan predicts", "at most", 6.0, "GB"),
    "large.weights.memory": Bar("`recall weights`, peak anonymous memory of the first 4 blocks", "at most", 6.0, "GB"),
    "stats.time": Bar("`recall stats`, whole process", "at most", 15.0, "s"),
    "stats.memory": Bar("`recall stats`, peak anonymous memory", "at most", 0.9, "GB"),
    "stats.directions": Bar("recall stats, from the inputs of all 210 maps to their directions", "at most", 3.0, "s"),
    "stats.error": Bar("recall stats, spectral error against dense float64 moments", "at most", 0.01, "of the largest eigenvalue"),
    "stats.growth": Bar("`recall stats`, peak anonymous memory with ten times as many typical samples", "at most", 1.2, "x"),
    "stats.merge": Bar("aligned, after imports", "at most", 4.0, "s"),
    "stats.merge.memory": Bar("aligned, peak anonymous memory, against linear", "at most", 1.2, "x"),
    "stats.large.time": Bar("recall stats, a block", "at most", 60.0, "s"),
    "stats.large.memory": Bar("recall stats, peak anonymous memory of the first 4 blocks", "at most", 6.0, "GB"),
    "startup.help": Bar("`recall --help`, whole process", "at most", 0.4, "s"),
}


@dataclass(frozen=True)
class Figure:
    """One line of the results.

    Attributes:
        bar: its name in `BARS`, or None.
        case: what it was measured on.
        values: one per pair of runs, or a single one.
        ours, other: seconds or gigabytes behind the values, run by run.
        note: what a reader should know.
        work, unit: what is measured and the unit of the values, where there is no bar.
    """

    bar: str | None
    case: str
    values: Sequence[float]
    ours: Sequence[float] = ()
    other: Sequence[float] = ()
    note: str = ""
    work: str = ""
    unit: str = ""

    def as_json(self) -> dict[str, Any]:
        """For the JSON file: with its bar and whether it was met, so that the file can be read alone."""
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
    """Three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def line(figure: dict[str, Any]) -> str:
    """A figure from a JSON file in words: median, spread, bar."""
    runs = len(figure["values"])
    spread = f" ({short(figure['min'])} to {short(figure['max'])}, {runs} pairs)" if runs > 1 else ""
    verdict = "" if figure["bar"] is None else f"; {figure['bar']}: {'met' if figure['met'] else 'MISSED'}"
    behind = ", ".join(f"{side} {short(median(figure[side]))}" for side in ("ours", "other") if figure[side])
    more = "".join(f" [{part}]" for part in (behind, figure["note"]) if part)
    return f"{figure['case']}: {figure['work']}: {short(figure['median'])} {figure['unit']}{spread}{verdict}{more}"
