"""A merge as tasks for the machines of a cluster: one for what each model represents, one for each shard of the result.

A task is given the plan as it was made, and what it reads and writes lies in files that all machines see: of models, only pooled
states travel. A shard is written under a name of the attempt, and takes its place when it is whole, so that a machine that is lost in the
middle leaves nothing that could be taken for a part of the result, and the attempt that follows needs to know nothing of it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recall_merge.files.durable import sync
from recall_merge.files.experts import Digest, FullExpert
from recall_merge.files.output import MARKER, WeightWriter
from recall_merge.files.safetensors import READ
from recall_merge.merging.plan import Plan
from recall_merge.merging.run import Losses, RecallWeights
from recall_merge.merging.samples import check_finite, expert_tokenizer, represent, typical_texts
from recall_merge.merging.tensors import merge_tensors_into
from recall_merge.merging.weights import MergeWeights, compare, compute_weights, pool_of, represent_whole, whole_note
from recall_merge.runtime.errors import OutputError, Unwalkable
from recall_merge.runtime.executor import PATIENCE, Executor
from recall_merge.runtime.progress import Progress, Silent

if TYPE_CHECKING:
    from torch import Tensor

ATTEMPT = ".attempt-"  # before the name of a folder in which a shard is being written, and the number of the process that writes it


def compute_weights_distributed(plan: Plan, executor: Executor, progress: Progress) -> MergeWeights:
    """What `compute_weights` gives, with a task for the typical samples and then one for each model of the pool. Errors are its.

    Losses are one task in all: they take a small part of the time, and whole models.
    """
    rule, plan = plan.weights, for_tasks(plan)
    if isinstance(rule, Losses):
        return _all(plan, executor, [Task("losses", compute_weights, (plan,), plan.memory_to_run)])[0]
    if not isinstance(rule, RecallWeights):
        return compute_weights(plan, progress)
    newest = plan.experts[-1].name
    with progress.stage(f"choosing typical samples with {newest}", 1, "tasks") as advance:
        first = Task(f"typical samples by {newest}", typical_texts, (plan, rule, Silent()), plan.memory_to_walk)
        ((texts, samples, notes),) = _all(plan, executor, [first], lambda _: advance(1))
    pool = pool_of(plan, rule)

    def states(*, whole: bool) -> Tensor:
        import torch

        memory = plan.memory_to_run if whole else plan.memory_to_walk
        tasks = [
            Task(f"representations of {model.name}", representations_of, (plan, place, texts, whole), memory)
            for place, model in enumerate(pool)
        ]
        with progress.stage("representations", len(tasks), "models") as advance:
            return torch.stack(_all(plan, executor, tasks, lambda _: advance(1)), dim=1)

    try:
        found = states(whole=False)
    except Unwalkable as error:
        notes = [*notes, *([whole_note(error)] if plan.by_layer else [])]
        found = states(whole=True)
    return compare(plan, rule, found, samples, notes)


def merge_distributed(
    plan: Plan, merge_weights: MergeWeights, executor: Executor, folder: Path, digest: Digest, progress: Progress
) -> dict[str, str]:
    """Write the weights files of the result and their index, a task a shard; returns the files' hashes.

    Args:
        folder: where all machines find it.
        digest: is told of every tensor of the base, as the full experts' own are of theirs.

    Raises:
        CheckpointError: if a model holds NaN or infinity, or a machine finds other files than were planned for.
        ResultError: if the merge overflows.
        OutputError: if a machine does not find the folder.
    """
    WeightWriter(folder, plan.shards)  # which begins with the index
    plan = for_tasks(plan)
    tasks = [
        Task(shard.file, write_shard, (plan, merge_weights, folder, place), plan.memory_to_merge) for place, shard in enumerate(plan.shards)
    ]
    with progress.stage(f"merging by {plan.method.name}", plan.bytes_written, "bytes") as advance:
        done = _all(plan, executor, tasks, lambda place: advance(plan.shards[place].nbytes))
    for left in folder.glob(f"{ATTEMPT}*"):
        shutil.rmtree(left)
    for shard in done:
        for own, lines in zip(_digests(plan, digest), shard.lines, strict=True):
            own.lines.update(lines)
    return {shard.file: found.hash for shard, found in zip(plan.shards, done, strict=True)}


@dataclass(frozen=True)
class ShardDone:
    """What comes back of a shard that was written: its hash, and the lines of the digests of the base and of each full expert."""

    hash: str
    lines: tuple[dict[str, str], ...]


def write_shard(plan: Plan, merge_weights: MergeWeights, folder: Path, place: int) -> ShardDone:
    """Merge the tensors of one shard into its file, wherever this runs."""
    _check_place(plan, folder)
    shard, digest = plan.shards[place], Digest()
    attempt = Path(tempfile.mkdtemp(prefix=f"{ATTEMPT}{os.getpid()}-", dir=folder))
    with WeightWriter(attempt, [shard]) as writer:
        merge_tensors_into(writer, plan, merge_weights, digest, lambda _: None, shard.specs)
    sync(attempt / shard.file)
    (attempt / shard.file).replace(folder / shard.file)
    attempt.rmdir()
    return ShardDone(writer.hashes[shard.file], tuple(own.lines for own in _digests(plan, digest)))


def representations_of(plan: Plan, place: int, texts: list[str], whole: bool) -> Tensor:
    """What one model of the pool represents of the typical samples, block by block or as a whole.    -> (L + 1, m, d), float32"""
    from recall_merge.models.hidden_states import tokenize

    plan.inputs.check_elsewhere()
    rule = plan.weights
    assert isinstance(rule, RecallWeights)
    expert = pool_of(plan, rule)[place]
    if whole:
        return represent_whole(plan, rule, expert, texts, Silent())
    tokens = tokenize(texts, expert_tokenizer(plan, expert), max_tokens=plan.samples.max_tokens)
    states = represent(plan, expert, rule, tokens, range(plan.base.layers.blocks + 1), lambda _: None)
    check_finite(plan, states, expert)
    return states


def for_tasks(plan: Plan) -> Plan:
    """The plan of one task of several at a time: on as many threads as the run says, or one. What it makes does not depend on that."""
    return replace(plan, run=plan.run.model_copy(update={"threads": plan.run.threads or 1}))


@dataclass(frozen=True)
class Task:
    """A function of a module with its arguments, what it is for people, and the bytes of memory that it takes at most."""

    label: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    memory: int


def _all(plan: Plan, executor: Executor, tasks: Sequence[Task], done: Callable[[int], None] = lambda _: None) -> list[Any]:
    """What the tasks return, in their order; no more of them are in flight than the executor has places.

    Args:
        done: is told the place of each task when it is done.
    """
    found: dict[int, Any] = {}
    running: dict[Future[Any], int] = {}
    begun = 0
    while len(found) < len(tasks):
        while begun < len(tasks) and len(running) < executor.slots:
            task = tasks[begun]
            running[executor.submit(task.label, _counted, task.function, task.arguments, memory=task.memory, threads=plan.threads)] = begun
            begun += 1
        for future in wait(running, timeout=PATIENCE, return_when=FIRST_COMPLETED).done:
            place = running.pop(future)
            found[place], read = future.result()
            READ.add(read)
            done(place)
    return [found[place] for place in range(len(tasks))]


def _counted(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, int]:
    """What a function returns, and how many bytes of tensors it has read."""
    before = READ.total
    return function(*arguments), READ.total - before


def _digests(plan: Plan, base: Digest) -> list[Digest]:
    return [base, *(expert.digest for expert in plan.experts if isinstance(expert, FullExpert))]


def _check_place(plan: Plan, folder: Path) -> None:
    plan.inputs.check_elsewhere()
    if not (folder / MARKER).exists():
        fix = "give `out` a path that means the same folder on every machine: on a shared file system"
        raise OutputError("a machine of the cluster does not find the folder that the result is written to", where=folder, fix=fix)
