"""A result in another tool's form: a run file for mergekit (github.com/arcee-ai/mergekit), or an adapter for PEFT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from recall_merge.files.adapter import open_adapter
from recall_merge.files.checkpoint import open_checkpoint
from recall_merge.files.experts import AdapterExpert
from recall_merge.files.hub import Located
from recall_merge.files.output import OutputFolder, beside
from recall_merge.files.safetensors import FLOATS
from recall_merge.interop.adapter_export import ExportedAdapter, plan_adapter, write_adapter
from recall_merge.maths.layers import Layers
from recall_merge.merging.result import Result, check_model, coefficients, find_models, open_result
from recall_merge.runtime.durable import write_whole
from recall_merge.runtime.errors import Faults, OutputError, ResultError
from recall_merge.runtime.progress import Progress, Silent

ONLY_SUMS = "only weighted sums can be exported (recall, linear, task_arithmetic, wise_ft; not pruned, without `parts`)"


@dataclass(frozen=True)
class ExportedRun:
    """A run file for mergekit."""

    path: Path
    text: str


def export_mergekit(
    folder: Path, *, models: Mapping[str, str] | None = None, out: Path | None = None, progress: Progress | None = None
) -> ExportedRun:
    """Write a run file with which mergekit makes the same model, up to the rounding of its dtype.

    theta_0 + sum_q c_q (theta_q - theta_0) = (1 - sum_q c_q) theta_0 + sum_q c_q theta_q, with c_q the coefficients of a layer. The base is
    one of mergekit's models if the c_q of some layer do not sum to 1. Adapters are named base+adapter.

    Args:
        models: where 'base' and experts are, if the record does not say; each is compared with the record, unless it names a commit.
        out: the file; RESULT.mergekit.yaml beside the result by default.

    Raises:
        RecallError: if the result is not a weighted sum, or a model is missing or different; with all such faults.
    """
    result = open_result(folder)
    target = out or beside(folder, ".mergekit.yaml")
    shares, faults = coefficients(result), Faults()
    if shares is None:
        what = f"the result was made by `{result.record['method']['name']}`; {ONLY_SUMS}"
        faults.add(what, where=folder, fix="use the result's own folder")
    if result.run["vocabulary"] is not None:
        faults.add("the result's vocabulary was aligned, in a way that mergekit does not", where=folder, fix="export an adapter")
    dtypes = {FLOATS[stored.spec.dtype] for stored in result.checkpoint.tensors.values() if stored.spec.is_float}
    if len(dtypes) > 1:
        what = f"the result is in {' and '.join(sorted(dtypes))}; mergekit writes one dtype"
        faults.add(what, where=folder, fix="merge with `out.dtype`")
    if target.exists():
        faults.add("the file already exists", where=target, fix="choose another with --out")
    located: dict[str, Located | str] = {}
    with faults.collect():
        located = find_models(result, ["base", *result.experts], models or {}, fetch=False)
    with faults.collect():
        _compare(result, located, progress or Silent())
    faults.raise_any(ResultError)
    assert shares is not None
    names = {name: _reference(place) for name, place in located.items()}
    rest = (0.0 if abs(share) < 1e-12 else share for share in (1 - shares.sum(1)).tolist())  # float64 leaves a little of 1 - 1
    by_model = {names["base"]: list(rest)}
    for expert, column in zip(result.experts, shares.T.tolist(), strict=True):
        by_model[f"{names['base']}+{names[expert]}" if result.is_adapter(expert) else names[expert]] = column
    merged, kept = [[name for name in result.checkpoint.tensors if result.merges(name) is wanted] for wanted in (True, False)]
    run = _linear_run(by_model, merged, kept, result.checkpoint.layers, dtypes.pop())
    lora = " --lora-merge-dtype float32" if any(map(result.is_adapter, result.experts)) else ""
    text = f"# mergekit-yaml {target.name} FOLDER{lora}\n{run}"
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
    """Write what a result adds to its base as a LoRA adapter that PEFT loads, with alpha = r, so that factors count as they are.

    A linear layer gets the best factors of the given rank, by a singular value decomposition in float64 of result - base as stored.
    Without a rank the adapter is exact: of rank min(o, i), or, if the result is a weighted sum of adapters, their factors side by side
    with the sum of their ranks. Everything else that changed (norms, embeddings, biases) is stored whole. Factors are float32.

    Args:
        rank: highest rank of every linear layer; exact by default.
        models: where 'base' and experts are, if the record does not say. Experts are needed only for exact factors of adapters.
        out: the folder; RESULT-adapter beside the result by default.

    Raises:
        RecallError: if a model is missing or different, or something changed that an adapter cannot hold; with all such faults.
    """
    result, progress = open_result(folder), progress or Silent()
    target = out or beside(folder, "-adapter")
    OutputFolder(target, overwrite=False).check({"the result": folder})
    same_rows = result.run["vocabulary"] is None  # otherwise rows of the experts are not those of the result
    shares = coefficients(result) if rank is None and same_rows and all(map(result.is_adapter, result.experts)) else None
    located = find_models(result, ["base", *(result.experts if shares is not None else [])], models or {})
    folders = _compare(result, located, progress)
    base = open_checkpoint(folders.pop("base"))
    adapters = [AdapterExpert(name, open_adapter(path, base)) for name, path in folders.items()]
    return write_adapter(target, plan_adapter(result, base, adapters, shares, rank), result.named("base"), progress)


def _compare(result: Result, models: Mapping[str, Located | str], progress: Progress) -> dict[str, Path]:
    """Compare the models that are on this machine with the record.    -> their folders

    Raises:
        ResultError: with all that are different.
    """
    folders, faults = {name: place.folder for name, place in models.items() if isinstance(place, Located)}, Faults()
    with progress.stage("comparing the models with the record", len(folders), "steps") as advance:
        for name, folder in folders.items():
            with faults.collect():
                check_model(result, name, folder)
            advance(1)
    faults.raise_any(ResultError)
    return folders


def _reference(place: Located | str) -> str:
    """The name of a model in mergekit's file."""
    if isinstance(place, str):
        return place
    if place.repo is not None:
        return f"{place.repo}@{place.revision}"
    path = str(place.folder.resolve())
    if set(path) & set("+@"):
        raise ResultError("mergekit cannot read a path with + or @ in it", where=path, fix="rename the folder")
    return path


def _linear_run(shares: Mapping[str, Sequence[float]], merged: Sequence[str], kept: Sequence[str], layers: Layers, dtype: str) -> str:
    """The text of a run file, from each model's share at every layer 0..L+1, the base first. `kept` tensors stay the base's.

    mergekit's `linear` takes a weight per model, a list of weights over the blocks, or either of them per part of a tensor's name. A list
    is read at i / (L - 1), so a list of L numbers is exact. Tensors outside the blocks would get the first block's number, so each is
    listed by name. Sums run in float32.
    """
    outside = [name for name in merged if not 1 <= layers.of(name) <= layers.blocks]
    base = next(iter(shares))
    models = []
    for reference, numbers in shares.items():
        weight: list[dict[str, Any]] = [{"filter": name, "value": 1.0 if reference == base else 0.0} for name in kept]
        weight += [{"filter": name, "value": float(numbers[layers.of(name)])} for name in outside]
        inside = [float(number) for number in numbers[1:-1]]
        weight.append({"value": inside if len(set(inside)) > 1 else inside[0]})
        models.append({"model": reference, "parameters": {"weight": weight}})
    if not kept and not any(shares[base]):
        del models[0]
    run = {"merge_method": "linear", "models": models, "parameters": {"normalize": False}, "dtype": "float32", "out_dtype": dtype}
    return yaml.safe_dump(run | {"tokenizer_source": base}, sort_keys=False, width=140, default_flow_style=None)
