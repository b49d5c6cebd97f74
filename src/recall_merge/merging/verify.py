"""Whether a result is sound: before it takes its place, and whenever somebody asks.

A result with the names, shapes, dtypes and vocabulary of the base loads wherever the base does: its headers, together with the finite
numbers and the hashes of the pass that wrote it, prove all that loading it would. Otherwise transformers loads it and runs it once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from recall_merge.files.adapter import CONFIG, WEIGHTS, is_adapter
from recall_merge.files.checkpoint import open_checkpoint, read_json
from recall_merge.files.record import verify_files
from recall_merge.files.safetensors import read_header
from recall_merge.files.statistics import open_statistics
from recall_merge.runtime.errors import CheckpointError, ResultError

if TYPE_CHECKING:
    from recall_merge.merging.plan import Plan


def validate_output(plan: Plan, folder: Path) -> None:
    """Compare the result's headers with the plan; load and run it where its structure changed or the run asks for that."""
    if open_checkpoint(folder).specs != dict(plan.specs):
        raise ResultError("the result's tensors are not those of the plan", where=plan.target)
    if plan.keeps_structure and not plan.run.out.reload:
        return
    try:
        finite = runs_finite(folder, min(8, plan.base.vocabulary_size))  # the first few ids are enough for a forward pass
    except CheckpointError as error:
        fix = "check that transformers can load the base, and that the vocabularies fit"
        raise ResultError(f"the result cannot be loaded: {error.faults[0].what}", where=plan.target, fix=fix) from error
    if not finite:
        raise ResultError("the result's forward pass gives numbers that are not finite", where=plan.target, fix="give `out.dtype: float32`")


def runs_finite(folder: Path, tokens: int) -> bool:
    """Whether a forward pass over the first tokens of the vocabulary gives finite numbers. Transformers must be able to load the folder."""
    import torch

    from recall_merge.models.load import build_model, running

    model = build_model(folder, dtype="auto")
    with torch.inference_mode(), running(model):
        return bool(model(input_ids=torch.arange(tokens).unsqueeze(0), use_cache=False).logits.isfinite().all())


def verify(folder: Path) -> dict[str, Any]:
    """The record of a result or an expert, after every byte is hashed: ResultError names each file that is missing, changed or new."""
    if not folder.is_dir():
        raise ResultError("there is no such folder", where=folder, fix="give the folder of a result of `recall merge`")
    record = verify_files(folder)
    open_statistics(folder)
    if is_adapter(folder):
        read_json(folder / CONFIG)
        read_header(folder / WEIGHTS)
    else:
        open_checkpoint(folder)
    return record
