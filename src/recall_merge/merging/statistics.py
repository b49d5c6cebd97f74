"""Input statistics of an expert: run it on the typical samples of its own rows, and keep what its linear layers read. No text is kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from recall_merge.files.experts import Expert, hash_expert
from recall_merge.files.names import Names
from recall_merge.files.statistics import InputStatistics, open_statistics, parts_of, write_statistics
from recall_merge.maths.moments import compress
from recall_merge.merging.forward import expert_tokenizer, load_expert
from recall_merge.merging.plan import Plan, make_plan
from recall_merge.merging.run import DEFAULT_RECALL, MergeRun
from recall_merge.merging.samples import TypicalSample, choose_samples, encode_samples
from recall_merge.merging.unsound import is_finite
from recall_merge.runtime.errors import CheckpointError
from recall_merge.runtime.progress import Progress, Silent

RANK = 24
TRAINING = "look at its training"


def make_statistics(run: MergeRun, *, rank: int = RANK, folder: Path | None = None, progress: Progress | None = None) -> InputStatistics:
    """Make the input statistics of a run's newest expert from the run's samples, and write them into the expert's folder.

    Args:
        rank: directions to keep of each second moment.
        folder: another folder to write to.

    Raises:
        RecallError: with every fault of the run; or if the folder cannot be written to.
    """
    plan, progress = make_plan(run, writes=False), progress or Silent()
    expert = plan.experts[-1]
    samples = choose_samples(plan, DEFAULT_RECALL, progress).rows
    parts, tensors = _moments(plan, expert, samples, rank, progress)
    facts = {
        "expert": hash_expert(expert),
        "base": plan.base.fingerprint,
        "samples": len(samples),
        "rows": [sample.row for sample in samples],
        "tokens": sum(sample.tokens for sample in samples),
        "rank": rank,
    }
    target = folder or expert.folder
    plan.inputs.check()
    try:
        target.mkdir(parents=True, exist_ok=True)
        write_statistics(target, parts, tensors, facts)
    except OSError as error:
        fix = "give another folder with --out, and name it under `stats:` of the expert"
        raise CheckpointError(f"the input statistics cannot be written: {error.strerror}", where=target, fix=fix) from error
    statistics = open_statistics(target)
    assert statistics is not None
    return statistics


def _moments(
    plan: Plan, expert: Expert, samples: Sequence[TypicalSample], rank: int, progress: Progress
) -> tuple[dict[str, Tensor], dict[str, tuple[str, int]]]:
    """The numbers by name, and for each tensor of the base its group of inputs and the axis along which they run."""
    from recall_merge.models.input_moments import input_moments

    rows = encode_samples(plan, samples, expert_tokenizer(plan, expert))
    with progress.stage(f"input statistics of {expert.name}", sum(len(row.input_ids) for row in rows), "tokens") as advance:
        try:
            groups = input_moments(load_expert(plan, expert, DEFAULT_RECALL), rows, seed=plan.run.seed, progress=advance)
        except FloatingPointError as error:
            what = f"the logits of expert '{expert.name}' are NaN or infinite"
            raise CheckpointError(what, where=expert.folder, fix=TRAINING) from error
    names = Names(plan.base)
    parts: dict[str, Tensor] = {}
    tensors: dict[str, tuple[str, int]] = {}
    for number, inputs in enumerate(groups):
        stored = {module: names.find(f"{module}.weight") for module in inputs.modules}
        maps = {name: module for module, name in stored.items() if name is not None and name not in plan.base.token_tensors}
        if not maps or not inputs.tokens:  # a head is no map to align, and a map that no token reached has no inputs
            continue
        if not all(is_finite(numbers.bfloat16()) for numbers in (inputs.moment, *inputs.gradients)):  # as they are stored
            what = f"the input statistics of expert '{expert.name}' overflow in '{next(iter(maps))}'"
            raise CheckpointError(what, where=expert.folder, fix=TRAINING)
        group = f"{number:04d}"
        compressed = compress(inputs.moment, rank)
        parts |= dict(zip(parts_of(group), (compressed.factor, compressed.rest), strict=True))
        for name, module in maps.items():
            parts[f"{name}.gradient"] = inputs.gradients[inputs.modules.index(module)]
        tensors |= dict.fromkeys(maps, (group, inputs.axis))
    return parts, tensors
