"""The bench: lay out the jobs, do those that are not done yet, and tell how long the rest will take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recall_merge.bench.design import Design, make_design
from recall_merge.bench.jobs import Job, Store
from recall_merge.bench.run_job import do
from recall_merge.bench.scenario import Scenario
from recall_merge.files.checkpoint import open_checkpoint
from recall_merge.runtime.errors import OutputError
from recall_merge.runtime.executor import PATIENCE, Executor
from recall_merge.runtime.open_executor import check_executor, open_executor

if TYPE_CHECKING:
    from recall_merge.bench.results import Summary

COPIES = 4  # of the base in float32
SECONDS_A_TOKEN = 0.01  # of a forward pass, before anything was measured
JOBS = "jobs"


@dataclass(frozen=True)
class Agenda:
    """The jobs of a design, each once and after those it needs, and how many of them are done."""

    jobs: tuple[Job, ...]
    done: frozenset[str]
    """Keys of those that are done."""

    @property
    def left(self) -> list[Job]:
        return [job for job in self.jobs if job.key not in self.done]


@dataclass(frozen=True)
class JobDone:
    """What a listener hears of when a job is done."""

    label: str
    kind: str
    seconds: float
    number: int
    """How many are done now, those of earlier runs included."""
    total: int
    seconds_left: float


Listener = Callable[[JobDone], None]


def bench(scenario: Scenario, *, executor: str = "local", command: str = "", listener: Listener = lambda _: None) -> Summary:
    """Do all that a scenario asks for and is not done yet, and write the results.

    Stopped at any moment, it goes on from there when asked again. With `workers` it runs as many processes of one thread each.

    Args:
        executor: `local`, `ray` or `ray://ADDRESS`; on a cluster, model, data and out must lie where every node finds them.
        command: what a reader of the results should type to have them again.
        listener: hears of every job that is done.

    Raises:
        RecallError: with every fault of the scenario, before any work starts; or with what went wrong in a job.
    """
    from recall_merge.bench.results import summarise

    check_executor(executor)
    design = make_design(scenario)
    store = store_of(scenario)
    with store.locked():
        store.keep_base(design.base)
        agenda = make_agenda(design, store)
        if agenda.left:
            with open_executor(executor, scenario.workers) as opened:
                _work(agenda, store, opened, listener, memory_of(design))
        return summarise(design, store, out_of(scenario), command=command)


def memory_of(design: Design) -> int:
    """Bytes of memory that a job takes at most, beside the interpreter's own: the model in float32 when it is trained, with room for its
    gradients, and when a merge of it is scored, with the tensors that it is built from."""
    return 4 * COPIES * sum(stored.spec.numel for stored in open_checkpoint(design.base.folder).tensors.values())


def out_of(scenario: Scenario) -> Path:
    if scenario.out is None:
        raise OutputError("the scenario does not say where its results go", where="out", fix="add `out: FOLDER`, or give --out FOLDER")
    return scenario.out


def store_of(scenario: Scenario) -> Store:
    return Store(out_of(scenario) / JOBS)


def make_agenda(design: Design, store: Store) -> Agenda:
    """All jobs of a design in the order of its trials, each after those that it needs."""
    found: dict[str, Job] = {}

    def add(job: Job) -> None:
        if job.key in found:
            return
        for need in job.needs:
            add(need)
        found[job.key] = job

    for trial in design.trials:
        for job in trial.jobs:
            add(job)
    for job in design.experts.values():
        add(job)
    wanted = _wanted([*found.values()], store)
    return Agenda(tuple(found.values()), frozenset(found) - wanted)


def _wanted(jobs: Sequence[Job], store: Store) -> set[str]:
    """Keys of the jobs to do: all scores that are missing, and of the others those that they cannot do without."""
    wanted: set[str] = set()
    for job in reversed(jobs):  # a job comes after its needs, so here before them
        asked = job.key in wanted or type(job).__name__ == "Scores"
        if asked and not store.is_done(job):
            wanted.add(job.key)
            wanted.update(need.key for need in job.needs)
        else:
            wanted.discard(job.key)
    return wanted


def seconds_left(jobs: Sequence[Job], store: Store, workers: int) -> float:
    """A guess from what the jobs done so far took, kind by kind."""
    seconds: dict[str, float] = {}
    costs: dict[str, float] = {}
    for note in store.notes():
        for kind in (note["kind"], "all"):
            seconds[kind] = seconds.get(kind, 0.0) + note["seconds"]
            costs[kind] = costs.get(kind, 0.0) + note["cost"]

    def rate(kind: str) -> float:
        known = next((name for name in (kind, "all") if costs.get(name)), None)
        return seconds[known] / costs[known] if known else SECONDS_A_TOKEN

    return sum(job.cost * rate(type(job).__name__.lower()) for job in jobs) / workers


def _work(agenda: Agenda, store: Store, executor: Executor, listener: Listener, memory: int = 0) -> None:
    left = {job.key: job for job in agenda.left}

    def finished(job: Job, seconds: float) -> None:
        del left[job.key]
        number, kind = len(agenda.jobs) - len(left), type(job).__name__.lower()
        remaining = seconds_left([*left.values()], store, executor.slots)
        listener(JobDone(job.label, kind, seconds, number, len(agenda.jobs), remaining))

    running: dict[Future[float], Job] = {}
    while left:
        at_work = {job.key for job in running.values()}
        for job in left.values():
            if len(running) >= executor.slots:
                break
            if job.key not in at_work and not any(need.key in left for need in job.needs):
                running[executor.submit(job.label, do, job, store, memory=memory)] = job
        for future in wait(running, timeout=PATIENCE, return_when=FIRST_COMPLETED).done:
            finished(running.pop(future), future.result())
