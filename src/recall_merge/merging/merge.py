"""The main job: base and experts in, one Hugging Face folder out, whole or not at all."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recall_merge.files.companions import write_companions
from recall_merge.files.experts import Digest
from recall_merge.files.model_card import PICTURE, write_model_card
from recall_merge.files.output import OutputFolder, WeightWriter
from recall_merge.files.record import RECORD, verify_files, write_record
from recall_merge.files.safetensors import READ
from recall_merge.merging.distributed import compute_weights_distributed, merge_distributed
from recall_merge.merging.layerwise import merge_layerwise
from recall_merge.merging.plan import Plan, make_plan
from recall_merge.merging.provenance import hash_models, hashes_of, made_apart, made_from, made_of, public_name, weights_from_record
from recall_merge.merging.run import MergeRun, RecallWeights
from recall_merge.merging.samples import typical_texts
from recall_merge.merging.tensors import conditions, merge_tensors_into
from recall_merge.merging.validate_output import Reader, check_result, reader
from recall_merge.merging.weights import MergeWeights, compute_weights, whole_note
from recall_merge.models.lean import import_clustering
from recall_merge.runtime import memory
from recall_merge.runtime.errors import MissingExtra, ResultError, Unwalkable
from recall_merge.runtime.executor import LOCAL, check_executor, open_executor
from recall_merge.runtime.progress import Progress, Silent

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class MergeResult:
    """What a merge made.

    Attributes:
        path: the folder of the result.
        weighting: similarity and weights by layer, and the typical samples.
        record: what `record.json` says.
        notes: what a reader should know.
    """

    path: Path
    merge_weights: MergeWeights
    record: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the columns of `similarity` and `weights`, the newest last."""
        return self.merge_weights.models

    @property
    def similarity(self) -> Tensor | None:
        """(L + 1, models), layers 0..L; None where weights were given."""
        return self.merge_weights.similarity

    @property
    def weights(self) -> Tensor:
        """(L + 2, models); each row sums to 1."""
        return self.merge_weights.weights


def merge(run: MergeRun, *, executor: str = LOCAL, progress: Progress | None = None, once: bool = False) -> MergeResult:
    """Merge as the run says.

    Args:
        executor: `local`, `ray` or `ray://ADDRESS`; on a cluster, models, samples and the result must lie where every machine finds them.
        once: this process merges nothing else, so what the check of the result imports may be imported by another one meanwhile.

    Raises:
        RecallError: with every fault of the run and its files, before any work starts; or with what went wrong later. Nothing is
            left of a merge that fails, and what stood in the output's place stands as it was.
    """
    check_executor(executor)
    memory.one_heap()
    with memory.few_searches(), reader(run) if once else nullcontext() as other:
        plan = make_plan(run)
        if once and run.samples is not None:
            import_clustering()
        return apply(plan, other, executor=executor, progress=progress)


def apply(plan: Plan, other: Reader | None = None, *, executor: str = LOCAL, progress: Progress | None = None) -> MergeResult:
    """Carry out a plan: weights, the pass over the parameters, everything beside them, checks; then the folder takes its place."""
    if other is not None:
        other.prepare(plan.base.folder)
    memory.give_back()  # what making the plan has taken, such as reading tokenizers
    progress, timings, before = progress or Silent(), Timings(), READ.total
    with OutputFolder(plan.target, overwrite=plan.run.out.overwrite) as out:
        digest = Digest()
        write = _write if executor == LOCAL else partial(_write_apart, executor)
        merge_weights, hashes = write(plan, out.path, digest, timings, progress)
        dtype = None if plan.run.out.dtype == "auto" else plan.run.out.dtype
        write_companions(out.path, plan.base.folder, [expert.folder for expert in plan.experts], plan.vocabulary, dtype)
        with timings.of("check"), progress.stage("checking the result", 1, "steps") as advance:
            check_result(plan, out.path, other)
            advance(1)
        record = {
            **made_from(plan),
            "models": hashes_of(plan, digest),
            **made_of(merge_weights),
            **({"parts": made_apart(plan)} if plan.own else {}),
            **({"statistics": _statistics(plan, merge_weights)} if plan.method.informed else {}),
            "notes": [*plan.notes, *merge_weights.notes],
            "bytes": {"read": READ.total - before, "written": plan.bytes_written},
            "peak_memory": peak_memory(),
            "seconds": dict(timings.seconds),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        plan.inputs.check()
        _draw(record, out.path)
        sources = list(dict.fromkeys(place.repo for place in plan.located.values() if place.repo))
        write_model_card(out.path, base=public_name(plan, "base"), base_folder=plan.base.folder, sources=sources, record=record)
        write_record(out.path, {**record, "files": hashes})
        out.commit()
    return MergeResult(plan.target, merge_weights, record, (*plan.notes, *merge_weights.notes))


def _write(plan: Plan, folder: Path, digest: Digest, timings: Timings, progress: Progress) -> tuple[MergeWeights, dict[str, str]]:
    """The weights files of the result, from weights that are known or layer by layer; returns the weights, and the files' hashes."""
    rule, label = plan.weights, f"merging by {plan.method.name}"
    with timings.of("weights"):
        ready = (
            typical_texts(plan, rule, progress) if isinstance(rule, RecallWeights) and plan.by_layer else compute_weights(plan, progress)
        )
    with timings.of("merge"):
        if not isinstance(ready, MergeWeights):
            try:
                with progress.stage(label, plan.bytes_written, "bytes") as advance, WeightWriter(folder, plan.shards) as writer:
                    return merge_layerwise(writer, plan, ready, digest, advance), writer.hashes
            except Unwalkable as error:
                merge_weights = compute_weights(plan, progress)
                ready = replace(merge_weights, notes=(*merge_weights.notes, whole_note(error)))
        with progress.stage(label, plan.bytes_written, "bytes") as advance, WeightWriter(folder, plan.shards) as writer:
            merge_tensors_into(writer, plan, ready, digest, advance)
            return ready, writer.hashes


def _write_apart(
    executor: str, plan: Plan, folder: Path, digest: Digest, timings: Timings, progress: Progress
) -> tuple[MergeWeights, dict[str, str]]:
    """The same, by tasks on an executor. It is closed before the folder is, so that of a merge that fails nobody writes on."""
    with open_executor(executor, plan.threads) as workers:
        with timings.of("weights"):
            merge_weights = compute_weights_distributed(plan, workers, progress)
        with timings.of("merge"):
            return merge_weights, merge_distributed(plan, merge_weights, workers, folder, digest, progress)


def reuse(run: MergeRun) -> MergeResult | None:
    """The result of an earlier merge, if the same run on the same bytes with the same versions made it and it has not changed since.

    Reads every input once, to hash it; names and times of files are not trusted.
    """
    if run.out.path is None or not (run.out.path / RECORD).is_file():
        return None
    plan = make_plan(run.model_copy(update={"out": run.out.model_copy(update={"overwrite": True})}))
    try:
        record = verify_files(plan.target)
    except ResultError:
        return None
    wanted = made_from(plan)
    wanted["run"]["out"]["overwrite"] = record.get("run", {}).get("out", {}).get("overwrite")  # how it got there does not matter
    if any(record.get(key) != value for key, value in wanted.items()) or record.get("models") != hash_models(plan):
        return None
    return MergeResult(plan.target, weights_from_record(record), record, tuple(record["notes"]))


def _draw(record: Mapping[str, Any], folder: Path) -> None:
    """The picture of the model card, where layers differ; without the `report` extra the input statistics has its tables alone."""
    from recall_merge.report.merge_charts import draw_weights

    weights = record["weights"]["rows"]
    if "similarity" in record or any(row != weights[0] for row in weights):
        with suppress(MissingExtra):
            draw_weights(record.get("similarity"), record["weights"], folder / PICTURE)


def peak_memory() -> int:
    """Bytes that this process has held at most since it began, whatever it did before the merge."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def _statistics(plan: Plan, merge_weights: MergeWeights) -> dict[str, Any]:
    """What the statistics were, and how well the systems that they make are conditioned (a bound for each tensor)."""
    facts = {
        e.name: {key: stats.facts[key] for key in ("samples", "tokens", "rank")}
        for e, stats in zip(plan.experts, plan.statistics, strict=True)
        if stats
    }
    return {"experts": facts, "condition": conditions(plan, merge_weights)}


class Timings:
    """Seconds by part of the work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = round(time.perf_counter() - start, 3)
