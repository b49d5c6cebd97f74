"""A merge as tasks for the machines of a cluster: one for the hidden states of each model, one for each shard of the result.

Each gets the plan as it was made, and reads and writes files that all machines see; of the models, only pooled hidden states travel. A
shard is renamed when it is whole: a machine that is lost in the middle leaves nothing that looks like a part of the result.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recall_merge.files.hashing import ModelDigest
from recall_merge.files.output import WeightWriter
from recall_merge.files.ownership import MARKER
from recall_merge.files.safetensors import READ
from recall_merge.merging.cost import forward_memory, merge_memory, weights_memory, whole_model_memory
from recall_merge.merging.forward import hidden_states_at, tokens_of, whole_hidden_states_at
from recall_merge.merging.layerwise import Visit, compute_weights, run_pass, whole_note
from recall_merge.merging.plan import Plan
from recall_merge.merging.run import LossWeights, RecallWeights
from recall_merge.merging.samples import choose_samples
from recall_merge.merging.tensors import digests_of, merge_tensors
from recall_merge.merging.weights import MergeWeights, given_weights
from recall_merge.runtime.durable import sync
from recall_merge.runtime.errors import NotLayerwise, OutputError
from recall_merge.runtime.executor import PATIENCE, Executor
from recall_merge.runtime.progress import Progress, Silent

ATTEMPT = ".attempt-"  # prefix of a folder in which a shard is being written; the number of its process follows


@dataclass(frozen=True)
class Task:
    """A module's function with its arguments, a label for people, and the maximum bytes of memory that it takes."""

    label: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    memory: int


@dataclass(frozen=True)
class ShardDone:
    """What comes back from a written shard: its hash, whether it differs from the base, and the digest lines of all full models."""

    hash: str
    differs: bool
    lines: tuple[dict[str, str], ...]


def compute_weights_distributed(plan: Plan, executor: Executor, progress: Progress) -> MergeWeights:
    """`compute_weights`: one task for the typical samples, one for each model's hidden states. Losses, soon done, are a single task."""
    rule, plan = plan.weights, plan_for_tasks(plan)
    if isinstance(rule, LossWeights):
        return run_tasks(plan, executor, [Task("losses", compute_weights, (plan,), weights_memory(plan))])[0]
    if not isinstance(rule, RecallWeights):
        return given_weights(plan)
    newest = plan.experts[-1].name
    with progress.stage(f"choosing typical samples with {newest}", 1, "tasks") as advance:
        choose = Task(f"typical samples by {newest}", choose_samples, (plan, rule, Silent()), forward_memory(plan))
        (samples,) = run_tasks(plan, executor, [choose], lambda _: advance(1))
    return run_pass(plan, samples, source=partial(_hidden_states_by_tasks, executor, progress))


def merge_distributed(
    plan: Plan, weights: MergeWeights, executor: Executor, folder: Path, digest: ModelDigest, progress: Progress
) -> tuple[bool, dict[str, str]]:
    """`merge_tensors`, one task per shard: write the result's weight files and their index where all machines find them.

    -> whether the result differs from the base, and the files' hashes
    """
    WeightWriter(folder, plan.shards)  # writes the index
    plan = plan_for_tasks(plan)
    tasks = [Task(shard.file, write_shard, (plan, weights, folder, i), merge_memory(plan)) for i, shard in enumerate(plan.shards)]
    with progress.stage(f"merging by {plan.name}", plan.bytes_written, "bytes") as advance:
        shards: list[ShardDone] = run_tasks(plan, executor, tasks, lambda i: advance(plan.shards[i].nbytes))
    for leftover in folder.glob(f"{ATTEMPT}*"):
        shutil.rmtree(leftover)
    for shard in shards:
        for own, lines in zip(digests_of(plan, digest), shard.lines, strict=True):
            own.lines.update(lines)
    hashes = {planned.file: shard.hash for planned, shard in zip(plan.shards, shards, strict=True)}
    return any(shard.differs for shard in shards), hashes


def write_shard(plan: Plan, weights: MergeWeights, folder: Path, number: int) -> ShardDone:
    """Merge the tensors of one shard into its file, on whichever machine this runs."""
    plan.inputs.check(elsewhere=True)
    if not (folder / MARKER).exists():
        fix = "give `out` a path that means the same folder on every machine: on a shared file system"
        raise OutputError("a machine of the cluster does not find the folder that the result is written to", where=folder, fix=fix)
    shard, digest = plan.shards[number], ModelDigest()
    attempt = Path(tempfile.mkdtemp(prefix=f"{ATTEMPT}{os.getpid()}-", dir=folder))
    with WeightWriter(attempt, [shard]) as writer:
        differs = merge_tensors(plan, weights, shard.specs, writer, digest)
    sync(attempt / shard.file)
    (attempt / shard.file).replace(folder / shard.file)
    attempt.rmdir()
    return ShardDone(writer.hashes[shard.file], differs, tuple(own.lines for own in digests_of(plan, digest)))


def hidden_states_of(plan: Plan, number: int, texts: Sequence[str], whole: bool) -> Tensor:
    """One compared model's hidden states of the typical samples at all layers, block by block or whole.    -> (L + 1, m, d), float32"""
    plan.inputs.check(elsewhere=True)
    rule, expert = plan.weights, plan.compared[number]
    assert isinstance(rule, RecallWeights)
    read = whole_hidden_states_at if whole else hidden_states_at
    return read(plan, expert, rule, tokens_of(plan, expert, texts), range(plan.base.layers.blocks + 1))


def plan_for_tasks(plan: Plan) -> Plan:
    """The plan for one of several tasks at a time: on a processor, with as many threads as the run gives, or one.

    The result does not depend on the threads.
    """
    return replace(plan, run=plan.run.model_copy(update={"threads": plan.run.threads or 1}), device=torch.device("cpu"))


def run_tasks(plan: Plan, executor: Executor, tasks: Sequence[Task], done: Callable[[int], None] = lambda _: None) -> list[Any]:
    """The results of the tasks, in their order; no more of them are in flight than the executor has slots. `done` takes their numbers."""
    results: dict[int, Any] = {}
    running: dict[Future[Any], int] = {}
    begun = 0
    while len(results) < len(tasks):
        while begun < len(tasks) and len(running) < executor.slots:
            task = tasks[begun]
            running[executor.submit(task.label, _counted, task.function, task.arguments, memory=task.memory, threads=plan.threads)] = begun
            begun += 1
        for future in wait(running, timeout=PATIENCE, return_when=FIRST_COMPLETED).done:
            number = running.pop(future)
            results[number], read = future.result()
            READ.add(read)
            done(number)
    return [results[number] for number in range(len(tasks))]


def _hidden_states_by_tasks(
    executor: Executor, progress: Progress, plan: Plan, rule: RecallWeights, texts: Sequence[str], visit: Visit, *, hold: bool
) -> list[str]:
    """A source of hidden states for `run_pass`: one task per model, which give all layers at once."""

    def states(*, whole: bool) -> Tensor:
        memory = whole_model_memory(plan) if whole else forward_memory(plan)
        tasks = [
            Task(f"hidden states of {model.name}", hidden_states_of, (plan, number, texts, whole), memory)
            for number, model in enumerate(plan.compared)
        ]
        with progress.stage("hidden states", len(tasks), "models") as advance:
            return torch.stack(run_tasks(plan, executor, tasks, lambda _: advance(1)), dim=1)

    notes: list[str] = []
    try:
        by_layer = states(whole=False)
    except NotLayerwise as error:
        notes = [whole_note(error)]
        by_layer = states(whole=True)
    for layer, reached in enumerate(by_layer):
        visit(layer, plan, reached)
    return notes


def _counted(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, int]:
    """What a function returns, and how many bytes of tensors it read."""
    before = READ.total
    return function(*arguments), READ.total - before
