"""The main job: base and experts in, one Hugging Face folder out, whole or not at all."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from torch import Tensor

from recall_merge.files.companions import write_companions
from recall_merge.files.hashing import ModelDigest
from recall_merge.files.model_card import PICTURE, write_model_card
from recall_merge.files.output import OutputFolder, WeightWriter
from recall_merge.files.record import RECORD, verify_files, write_record
from recall_merge.files.safetensors import READ
from recall_merge.merging.distributed import compute_weights_distributed, merge_distributed
from recall_merge.merging.layerwise import prepare, run_pass
from recall_merge.merging.plan import Plan, make_plan
from recall_merge.merging.result import hash_models, inputs_for_record, public_name, record_of, weights_from_record
from recall_merge.merging.run import MergeRun
from recall_merge.merging.tensors import TensorCollector, Writer, merge_tensors
from recall_merge.merging.unsound import refuse_base
from recall_merge.merging.verify import validate_output
from recall_merge.merging.weights import MergeWeights
from recall_merge.runtime import memory
from recall_merge.runtime.errors import MissingExtra, ResultError
from recall_merge.runtime.executor import LOCAL, check_executor, device_of_tasks, open_executor
from recall_merge.runtime.progress import Progress, Silent

Draw = Callable[[Mapping[str, Any] | None, Mapping[str, Any], Path], object]
"""Draws similarity (if any) and weights, in the form of the record, into a file."""


@dataclass(frozen=True)
class MergeResult:
    """What a merge made."""

    path: Path
    """The folder of the result."""
    merge_weights: MergeWeights
    """Similarity and weights by layer, and the typical samples."""
    record: dict[str, Any]
    """The content of `record.json`."""
    notes: tuple[str, ...]
    """What a reader should know."""
    reused: bool = False
    """An earlier merge had made it."""

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>note: {escape(note)}</p>" for note in self.notes)
        return f"<p>{escape(self.record['run']['method'])}, in {escape(str(self.path))}</p>{self.merge_weights._repr_html_()}{notes}"

    @property
    def models(self) -> tuple[str, ...]:
        """The columns of `similarity` and `weights`, newest last."""
        return self.merge_weights.models

    @property
    def similarity(self) -> Tensor | None:
        """(L + 1, models), layers 0..L; None where weights do not come from hidden states."""
        return self.merge_weights.similarity

    @property
    def weights(self) -> Tensor:
        """(L + 2, models); each row sums to 1."""
        return self.merge_weights.weights


def merge(run: MergeRun, *, executor: str = LOCAL, progress: Progress | None = None, draw: Draw | None = None) -> MergeResult:
    """Merge as the run says.

    Args:
        executor: `local`, `ray` or `ray://ADDRESS`; on a cluster, models, samples and the result must lie where every machine finds them.
        draw: draws the picture of the model card.

    Raises:
        RecallError: with every fault of the run and its files, before any work starts; or with what went wrong later. A merge that
            fails leaves nothing behind, and what stood in the output's place stays as it was.
    """
    check_executor(executor)
    device = device_of_tasks(executor, run.device)
    memory.one_heap()
    return apply(make_plan(run.model_copy(update={"device": device})), executor=executor, progress=progress, draw=draw)


def apply(plan: Plan, *, executor: str = LOCAL, progress: Progress | None = None, draw: Draw | None = None) -> MergeResult:
    """Carry out a plan: weights, the pass over the parameters, all files beside them, checks; then the folder takes its place."""
    memory.give_back()  # what making the plan took, such as reading tokenizers
    progress, seconds, before = progress or Silent(), dict[str, float](), READ.total
    with OutputFolder(plan.target, overwrite=plan.run.out.overwrite) as out:
        digest = ModelDigest()
        if executor == LOCAL:
            with WeightWriter(out.path, plan.shards) as writer:
                (weights, differs), hashes = merge_into(writer, plan, digest, seconds, progress), writer.hashes
        else:
            weights, differs, hashes = _write_distributed(executor, plan, out.path, digest, seconds, progress)
        if not differs:
            refuse_base(plan)
        dtype = None if plan.run.out.dtype == "auto" else plan.run.out.dtype
        write_companions(out.path, plan.base.folder, [expert.folder for expert in plan.experts], plan.vocabulary, dtype, plan.speaker)
        with _timed(seconds, "check"), progress.stage("checking the result", 1, "steps") as advance:
            validate_output(plan, out.path)
            advance(1)
        record = {
            **record_of(plan, weights, digest),
            "bytes": {"read": READ.total - before, "written": plan.bytes_written},
            "peak_memory": peak_memory(),
            "seconds": seconds,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        plan.inputs.check()
        rows = record["weights"]["rows"]
        if draw is not None and ("similarity" in record or any(row != rows[0] for row in rows)):  # where layers differ
            with suppress(MissingExtra):  # without the `report` extra the card has its tables alone
                draw(record.get("similarity"), record["weights"], out.path / PICTURE)
        sources = list(dict.fromkeys(model.repo for model in plan.located.values() if model.repo))
        write_model_card(out.path, base=public_name(plan, "base"), base_folder=plan.base.folder, sources=sources, record=record)
        write_record(out.path, {**record, "files": hashes})
        left = out.commit()
    return MergeResult(plan.target, weights, record, (*plan.notes, *weights.notes, *left))


def merge_in_memory(plan: Plan, progress: Progress | None = None) -> tuple[dict[str, Tensor], MergeWeights]:
    """The result's tensors, by the same pass, without writing them."""
    collector = TensorCollector(plan)
    weights, _ = merge_into(collector, plan, ModelDigest(), {}, progress or Silent())
    return collector.tensors, weights


def merge_into(writer: Writer, plan: Plan, digest: ModelDigest, seconds: dict[str, float], progress: Progress) -> tuple[MergeWeights, bool]:
    """Merge all tensors into a writer: by weights that are known before, or layer by layer as they become known.

    -> the weights, and whether the result differs from the base
    """
    with _timed(seconds, "weights"):
        start = prepare(plan, progress)
    with _timed(seconds, "merge"), progress.stage(f"merging by {plan.name}", plan.bytes_written, "bytes") as advance:
        if isinstance(start, MergeWeights):
            return start, merge_tensors(plan, start, plan.specs, writer, digest, advance)
        differs = list[bool]()  # by layer

        def merge_layer(held: Plan, weights: MergeWeights, names: Sequence[str]) -> None:
            differs.append(merge_tensors(held, weights, names, writer, digest, advance))

        return run_pass(plan, start, merge=merge_layer), any(differs)


def _write_distributed(
    executor: str, plan: Plan, folder: Path, digest: ModelDigest, seconds: dict[str, float], progress: Progress
) -> tuple[MergeWeights, bool, dict[str, str]]:
    """Weights, whether the result differs from the base, and hashes, by tasks.

    The executor closes before the folder does: nobody goes on writing for a merge that failed.
    """
    with open_executor(executor, plan.threads) as workers:
        with _timed(seconds, "weights"):
            weights = compute_weights_distributed(plan, workers, progress)
        with _timed(seconds, "merge"):
            return weights, *merge_distributed(plan, weights, workers, folder, digest, progress)


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
    wanted = inputs_for_record(plan)
    wanted["run"]["out"]["overwrite"] = record.get("run", {}).get("out", {}).get("overwrite")  # how it got there does not matter
    if any(record.get(key) != value for key, value in wanted.items()) or record.get("models") != hash_models(plan):
        return None
    plan.inputs.check()
    return MergeResult(plan.target, weights_from_record(record), record, tuple(record["notes"]), reused=True)


def peak_memory() -> int:
    """Maximum bytes that this process has held since it began, whatever it did before the merge."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Add the seconds of a part of the work to `seconds`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[part] = round(time.perf_counter() - start, 3)
