"""The bench: lay out the cells, do those that are not done yet, and tell how long the rest will take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recall_merge.bench.design import Design, make_design
from recall_merge.bench.jobs import Cell, Store
from recall_merge.bench.run_job import do
from recall_merge.bench.scenario import Scenario
from recall_merge.files.checkpoint import open_checkpoint
from recall_merge.runtime.errors import OutputError
from recall_merge.runtime.executor import PATIENCE, Engine, check_engine, open_engine

if TYPE_CHECKING:
    from recall_merge.bench.results import Summary

COPIES = 4  # of the base in float32
SECONDS_A_TOKEN = 0.01  # of a forward pass, before anything was measured
CELLS = "cells"


@dataclass(frozen=True)
class Agenda:
    """The cells of a design, each once and after those it needs, and how many of them are done."""

    cells: tuple[Cell, ...]
    done: frozenset[str]
    """Keys of those that are done."""

    @property
    def left(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.key not in self.done]


@dataclass(frozen=True)
class CellDone:
    """What a listener hears of when a cell is done."""

    label: str
    kind: str
    seconds: float
    number: int
    """How many are done now, those of earlier runs included."""
    total: int
    seconds_left: float


Listener = Callable[[CellDone], None]


def bench(scenario: Scenario, *, engine: str = "local", command: str = "", listener: Listener = lambda _: None) -> Summary:
    """Do all that a scenario asks for and is not done yet, and write the results.

    Stopped at any moment, it goes on from there when asked again. With `workers` it runs as many processes of one thread each.

    Args:
        engine: `local`, `ray` or `ray://ADDRESS`; on a cluster, model, data and out must lie where every node finds them.
        command: what a reader of the results should type to have them again.
        listener: hears of every cell that is done.

    Raises:
        RecallError: with every fault of the scenario, before any work starts; or with what went wrong in a cell.
    """
    from recall_merge.bench.results import summarise

    check_engine(engine)
    design = make_design(scenario)
    store = store_of(scenario)
    with store.locked():
        store.keep_base(design.base)
        agenda = make_agenda(design, store)
        if agenda.left:
            with open_engine(engine, scenario.workers) as opened:
                _work(agenda, store, opened, listener, memory_of(design))
        return summarise(design, store, out_of(scenario), command=command)


def memory_of(design: Design) -> int:
    """Bytes of memory that a cell takes at most, beside the interpreter's own: the model in float32 when it is trained, with room for its
    gradients, and when a merge of it is scored, with the tensors that it is built from."""
    return 4 * COPIES * sum(stored.spec.numel for stored in open_checkpoint(design.base.folder).tensors.values())


def out_of(scenario: Scenario) -> Path:
    if scenario.out is None:
        raise OutputError("the scenario does not say where its results go", where="out", fix="add `out: FOLDER`, or give --out FOLDER")
    return scenario.out


def store_of(scenario: Scenario) -> Store:
    return Store(out_of(scenario) / CELLS)


def make_agenda(design: Design, store: Store) -> Agenda:
    """All cells of a design in the order of its trials, each after those that it needs."""
    found: dict[str, Cell] = {}

    def add(cell: Cell) -> None:
        if cell.key in found:
            return
        for need in cell.needs:
            add(need)
        found[cell.key] = cell

    for trial in design.trials:
        for cell in trial.cells:
            add(cell)
    for cell in design.experts.values():
        add(cell)
    wanted = _wanted([*found.values()], store)
    return Agenda(tuple(found.values()), frozenset(found) - wanted)


def _wanted(cells: Sequence[Cell], store: Store) -> set[str]:
    """Keys of the cells to do: all scores that are missing, and of the others those that they cannot do without."""
    wanted: set[str] = set()
    for cell in reversed(cells):  # a cell comes after its needs, so here before them
        asked = cell.key in wanted or type(cell).__name__ == "Scores"
        if asked and not store.is_done(cell):
            wanted.add(cell.key)
            wanted.update(need.key for need in cell.needs)
        else:
            wanted.discard(cell.key)
    return wanted


def seconds_left(cells: Sequence[Cell], store: Store, workers: int) -> float:
    """A guess from what the cells done so far took, kind by kind."""
    seconds: dict[str, float] = {}
    costs: dict[str, float] = {}
    for note in store.notes():
        for kind in (note["kind"], "all"):
            seconds[kind] = seconds.get(kind, 0.0) + note["seconds"]
            costs[kind] = costs.get(kind, 0.0) + note["cost"]

    def rate(kind: str) -> float:
        known = next((name for name in (kind, "all") if costs.get(name)), None)
        return seconds[known] / costs[known] if known else SECONDS_A_TOKEN

    return sum(cell.cost * rate(type(cell).__name__.lower()) for cell in cells) / workers


def _work(agenda: Agenda, store: Store, engine: Engine, listener: Listener, memory: int = 0) -> None:
    left = {cell.key: cell for cell in agenda.left}

    def finished(cell: Cell, seconds: float) -> None:
        del left[cell.key]
        number, kind = len(agenda.cells) - len(left), type(cell).__name__.lower()
        remaining = seconds_left([*left.values()], store, engine.slots)
        listener(CellDone(cell.label, kind, seconds, number, len(agenda.cells), remaining))

    running: dict[Future[float], Cell] = {}
    while left:
        at_work = {cell.key for cell in running.values()}
        for cell in left.values():
            if len(running) >= engine.slots:
                break
            if cell.key not in at_work and not any(need.key in left for need in cell.needs):
                running[engine.submit(cell.label, do, cell, store, memory=memory)] = cell
        for future in wait(running, timeout=PATIENCE, return_when=FIRST_COMPLETED).done:
            finished(running.pop(future), future.result())
