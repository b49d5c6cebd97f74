"""How long a user waits before anything happens: `recall --help`, beside an empty Python and `mergekit-yaml --help`."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from benchmarks.bars import Figure
from benchmarks.measure import Bench, Side, ratios, run


def measure(bench: Bench) -> Iterator[Figure]:
    ours = [sys.executable, "-m", "recall_merge", "--help"]
    sides = {"recall --help": Side(lambda: run(ours)), "python -c pass": Side(lambda: run([sys.executable, "-c", "pass"]))}
    if bench.peer:
        theirs = [bench.peer.with_name("mergekit-yaml"), "--help"]
        sides["mergekit-yaml --help"] = Side(lambda: run(theirs))
    runs = bench.in_turn(sides)
    seconds = {name: [run.wall for run in done] for name, done in runs.items()}
    help_, empty = seconds["recall --help"], seconds["python -c pass"]
    note = f"{imports(ours)} modules imported; an empty Python imports {imports([sys.executable, '-c', 'pass'])}"
    yield Figure("startup.help", "`recall --help`", help_, help_, empty, note)
    if bench.peer:
        note = f"mergekit imports {imports([bench.peer, *theirs])} modules"
        values = ratios(runs["mergekit-yaml --help"], runs["recall --help"])
        work = "against `mergekit-yaml --help`"
        yield Figure(None, "`recall --help`", values, help_, seconds["mergekit-yaml --help"], note, work, "x as fast")


def imports(command: list) -> int:
    """How many modules a Python command loads."""
    python, *rest = command
    return sum(row.startswith("import time:") for row in run([python, "-X", "importtime", *rest]).err.splitlines()) - 1
