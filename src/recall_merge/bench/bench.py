"""The bench: lay out the jobs, do those that are not done yet, say how long the rest will take, and write the results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from recall_merge.bench.design import Design, make_design
from recall_merge.bench.jobs import Job, Scores, Store, cost_of, needs_of, with_needs
from recall_merge.bench.markdown import summary_page
from recall_merge.bench.page import save_pictures
from recall_merge.bench.results import Results, gather
from recall_merge.bench.run_job import run_job
from recall_merge.bench.scenario import Scenario
from recall_merge.files.checkpoint import open_checkpoint
from recall_merge.runtime.durable import LEFT, write_whole
from recall_merge.runtime.errors import MissingExtra, OutputError
from recall_merge.runtime.executor import PATIENCE, Executor, check_executor, device_of_tasks, open_executor
from recall_merge.runtime.paths import path_of

COPIES = 4  # of the base in float32: a job trains it with its gradients, or scores it beside the tensors that it is merged from
SECONDS_PER_TOKEN = 0.01  # of a forward pass, before anything was measured


@dataclass(frozen=True)
class Agenda:
    """The jobs of a design, each once and after those it needs, and those of them that are left to do."""

    jobs: list[Job]
    left: list[Job]


@dataclass(frozen=True)
class JobDone:
    """What a listener learns about a job that is done."""

    label: str
    kind: str
    seconds: float
    number: int  # of all that are done, those of earlier runs included
    total: int
    seconds_left: float


Listener = Callable[[JobDone], None]


def bench(
    scenario: Scenario,
    *,
    executor: str = "local",
    command: str = "",
    allowed: Collection[str] = (),
    listener: Listener = lambda _: None,
) -> Results:
    """Do all that a scenario asks for and is not done yet, and write the results.

    Stopped at any moment, it goes on from there when it is called again. `workers` processes of one thread each do the work.

    Args:
        executor: `local`, `ray` or `ray://ADDRESS`; on a cluster, model, data and out must lie where every node finds them.
        command: what a reader of the results should type to get them again.
        allowed: names of the training's `arguments` that may do more than train.
        listener: is called with every job that is done.

    Raises:
        RecallError: with every fault of the scenario, before any work starts; or with what went wrong in a job.
    """
    check_executor(executor)
    design = make_design(scenario.model_copy(update={"device": device_of_tasks(executor, scenario.device)}), allowed)
    store = store_of(scenario)
    with store.locked():
        if not store.folder.is_symlink():
            for left in (*store.folder.parent.glob(LEFT), *store.folder.rglob(LEFT)):  # which follow no link
                if left.is_file():
                    left.unlink()
        store.keep_base(design.base)
        agenda = make_agenda(design, store)
        if agenda.left:
            memory = 4 * COPIES * sum(stored.spec.numel for stored in open_checkpoint(design.base.folder).tensors.values())
            with open_executor(executor, scenario.workers) as opened:
                _work(agenda, store, opened, listener, memory)
        return write_results(design, store, command=command)


def write_results(design: Design, store: Store, *, command: str = "") -> Results:
    """Write the results of all trials that are complete: tables, `summary.md`, and pictures where the `report` extra is installed."""
    results = gather(design, store, out_of(design.scenario))
    results.write()
    pictures: list[Path] = []
    with suppress(MissingExtra):
        pictures = save_pictures(results)
    page = summary_page(results, design, store.notes(), command=command, pictures=pictures)
    write_whole(results.folder / "summary.md", page)
    return results


def out_of(scenario: Scenario) -> Path:
    if scenario.out is None:
        raise OutputError("the scenario does not say where its results go", where="out", fix="add `out: FOLDER`, or give --out FOLDER")
    return path_of(scenario.out)


def store_of(scenario: Scenario) -> Store:
    return Store(out_of(scenario) / "jobs")


def make_agenda(design: Design, store: Store) -> Agenda:
    """All jobs of a design in the order of its trials. To do are all scores that are missing, and what they need that is missing."""
    jobs = with_needs([*(job for trial in design.trials for job in trial.jobs), *design.experts.values()])
    wanted: set[str] = set()
    for job in reversed(jobs):  # a job comes after its needs, so here before them
        if job.key in wanted or isinstance(job, Scores):
            if store.is_done(job):
                wanted.discard(job.key)
            else:
                wanted.update((job.key, *(need.key for need in needs_of(job))))
    return Agenda(jobs, [job for job in jobs if job.key in wanted])


def seconds_left(jobs: Sequence[Job], store: Store, workers: int) -> float:
    """An estimate from what the jobs done so far took, kind by kind."""
    seconds, costs = Counter[str](), Counter[str]()
    for note in store.notes():
        for kind in (note["kind"], "all"):
            seconds[kind] += note["seconds"]
            costs[kind] += note["cost"]

    def rate(kind: str) -> float:
        measured = next((name for name in (kind, "all") if costs[name]), None)
        return seconds[measured] / costs[measured] if measured else SECONDS_PER_TOKEN

    return sum(cost_of(job) * rate(job.kind) for job in jobs) / workers


def _work(agenda: Agenda, store: Store, executor: Executor, listener: Listener, memory: int) -> None:
    left = {job.key: job for job in agenda.left}
    running: dict[Future[float], Job] = {}
    while left:
        at_work = {job.key for job in running.values()}
        for job in left.values():
            if len(running) >= executor.slots:
                break
            if job.key not in at_work and not any(need.key in left for need in needs_of(job)):
                running[executor.submit(job.label, run_job, job, store, memory=memory)] = job
        for future in wait(running, timeout=PATIENCE, return_when=FIRST_COMPLETED).done:
            job, seconds = running.pop(future), future.result()
            del left[job.key]
            number, remaining = len(agenda.jobs) - len(left), seconds_left([*left.values()], store, executor.slots)
            listener(JobDone(job.label, job.kind, seconds, number, len(agenda.jobs), remaining))
