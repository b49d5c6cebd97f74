"""A result in another tool's form: a run file for mergekit, or an adapter for PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from recall_merge.files.adapter import open_adapter
from recall_merge.files.checkpoint import open_checkpoint
from recall_merge.files.durable import write_whole
from recall_merge.files.experts import AdapterExpert
from recall_merge.files.hub import Located
from recall_merge.files.output import OutputFolder
from recall_merge.files.safetensors import FLOATS
from recall_merge.interop.adapter_export import ExportedAdapter, plan_adapter, write_adapter
from recall_merge.interop.mergekit_export import linear_run
from recall_merge.merging.result import Result, check_model, coefficients, find_models, open_result
from recall_merge.runtime.errors import Faults, OutputError, ResultError
from recall_merge.runtime.progress import Progress, Silent

NO_SUM = "only weighted sums (recall, linear, task_arithmetic, wise_ft; not pruned, without `parts`) can be written so"


@dataclass(frozen=True)
class ExportedRun:
    """A run file for mergekit."""

    path: Path
    text: str


def export_mergekit(
    folder: Path,
    *,
    models: Mapping[str, str] | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
) -> ExportedRun:
    """Write a run file with which mergekit makes the same model, up to the rounding of its dtype.

    theta_0 + sum_q c_q (theta_q - theta_0) = (1 - sum_q c_q) theta_0 + sum_q c_q theta_q, c_q the coefficients of a layer: the base is one
    of mergekit's models wherever the c_q of some layer do not sum to 1. Adapters are named as base+adapter.

    Args:
        models: where 'base' and experts are, if the record does not say; each is compared with the record, unless it names a commit.
        out: the file; RESULT.mergekit.yaml beside the result by default.

    Raises:
        RecallError: if the result is no weighted sum, or a model is missing or another; with all such faults.
    """
    result = open_result(folder)
    target = out or folder.with_name(f"{folder.resolve().name}.mergekit.yaml")
    parts, faults = coefficients(result), Faults()
    if parts is None:
        faults.add(f"the result was made by `{result.record['method']['name']}`; {NO_SUM}", where=folder, fix="export the folder itself")
    if result.run["vocabulary"] is not None:
        faults.add("the result's vocabulary was aligned, which no run of mergekit does alike", where=folder, fix="export an adapter")
    dtypes = {FLOATS[stored.spec.dtype] for stored in result.checkpoint.tensors.values() if stored.spec.is_float}
    if len(dtypes) > 1:
        faults.add(
            f"the result is in {' and '.join(sorted(dtypes))}; mergekit writes one dtype", where=folder, fix="merge with `out.dtype`"
        )
    if target.exists():
        faults.add("there is such a file already", where=target, fix="choose another with --out")
    found: dict[str, Located | str] = {}
    with faults.collect():
        found = find_models(result, ["base", *result.experts], models or {}, fetch=False)
    with faults.collect():
        _compare(result, {name: place for name, place in found.items() if isinstance(place, Located)}, progress or Silent())
    faults.raise_any(ResultError)
    assert parts is not None
    words = {name: _reference(place) for name, place in found.items()}
    shares = {words["base"]: (1 - parts.sum(1)).tolist()}
    for column, name in enumerate(result.experts):
        shares[f"{words['base']}+{words[name]}" if result.is_adapter(name) else words[name]] = parts[:, column].tolist()
    shares[words["base"]] = [0.0 if abs(share) < 1e-12 else share for share in shares[words["base"]]]  # what float64 leaves of 1 - 1
    tensors = list(result.checkpoint.tensors)
    merged = [name for name in tensors if result.merges(name)]
    kept = [name for name in tensors if not result.merges(name)]
    text = linear_run(shares, merged, kept, result.checkpoint.layers, dtypes.pop())
    lora = " --lora-merge-dtype float32" if any(map(result.is_adapter, result.experts)) else ""
    text = f"# mergekit-yaml {target.name} FOLDER{lora}\n{text}"
    try:
        write_whole(target, text)
    except OSError as error:
        raise OutputError(f"the file cannot be written: {error.strerror}", where=target, fix="choose another with --out") from error
    return ExportedRun(target, text)


def export_adapter(
    folder: Path,
    *,
    rank: int | None = None,
    models: Mapping[str, str] | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
) -> ExportedAdapter:
    """Write what a result adds to its base as an adapter that PEFT loads: LoRA with alpha = r, so factors count as they are.

    A linear map has the best factors of the rank asked for, by a singular value decomposition in float64 of result - base as they are
    stored. Without a rank the adapter is exact: of min(o, i), or, where the result is a weighted sum of adapters, of their factors side by
    side with the sum of their ranks. What is no linear map (norms, embeddings, biases) is held whole. Factors are float32.

    Args:
        rank: at most, of every linear map; exact by default.
        models: where 'base' and experts are, if the record does not say. Experts are needed only for exact factors of adapters.
        out: the folder; RESULT-adapter beside the result by default.

    Raises:
        RecallError: if a model is missing or another, or something changed that an adapter cannot hold; with all such faults.
    """
    result, progress = open_result(folder), progress or Silent()
    target = out or folder.with_name(f"{folder.resolve().name}-adapter")
    OutputFolder(target, overwrite=False).check({"the result": folder})
    parts = coefficients(result) if rank is None and all(map(result.is_adapter, result.experts)) else None
    if result.run["vocabulary"] is not None:
        parts = None  # rows of experts are not those of the result
    found = find_models(result, ["base", *(result.experts if parts is not None else [])], models or {})
    places = {name: place for name, place in found.items() if isinstance(place, Located)}
    _compare(result, places, progress)
    opened = open_checkpoint(places["base"].folder)
    adapters = [AdapterExpert(name, open_adapter(places[name].folder, opened)) for name in result.experts] if parts is not None else []
    return write_adapter(target, plan_adapter(result, opened, adapters, parts, rank), result.named("base"), progress)


def _compare(result: Result, places: Mapping[str, Located], progress: Progress) -> None:
    """Compare models with the record, and tell of all that are others."""
    faults = Faults()
    with progress.stage("comparing the models with the record", len(places), "steps") as advance:
        for name, place in places.items():
            with faults.collect():
                check_model(result, name, place.folder)
            advance(1)
    faults.raise_any(ResultError)


def _reference(place: Located | str) -> str:
    """How mergekit is told of a model."""
    if isinstance(place, str):
        return place
    if place.repo is not None:
        return f"{place.repo}@{place.revision}"
    path = str(place.folder.resolve())
    if set(path) & set("+@"):
        raise ResultError("mergekit cannot be told of a path with + or @ in it", where=path, fix="rename the folder")
    return path
