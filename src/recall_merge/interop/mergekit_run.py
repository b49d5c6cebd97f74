"""Reads a run file of mergekit as a run of ours that gives the same result."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recall_merge.files.checkpoint import Checkpoint, open_checkpoint
from recall_merge.files.hub import locate
from recall_merge.interop.mergekit_file import KEY, MergekitFile, Values, check_file, slices_of, values_of
from recall_merge.merging.run import MergeRun, load_run
from recall_merge.runtime.errors import RunError
from recall_merge.runtime.paths import exists, path_of
from recall_merge.runtime.sections import assign, parse, read_mapping

MERGES_BASE = ("linear", "slerp", "karcher")  # the base is one of the merged models
NEEDS_NO_BASE = ("linear", "karcher", "nuslerp")
ELECTS_SIGNS = ("ties", "dare_ties", "breadcrumbs_ties", "della")
Outcome = tuple[tuple[float, ...], str]
"""What one tensor gets: one weight per expert, and the method's options as JSON, so that equal outcomes can be counted."""


def is_mergekit(data: Any) -> bool:
    """Whether the content of a run file is mergekit's, by a key that all of its files have and none of ours."""
    return isinstance(data, Mapping) and KEY in data


def load_any_run(path: Path, overrides: Mapping[str, Any] | None = None) -> MergeRun:
    """Read a run from a file of ours or of mergekit.

    Raises:
        RunError: with every fault of the file.
    """
    data = read_mapping(path, "run", "docs/run.md")
    return run_of_mergekit(data, path, overrides) if is_mergekit(data) else load_run(path, overrides)


def run_of_mergekit(data: Mapping[str, Any], path: Path, overrides: Mapping[str, Any] | None = None) -> MergeRun:
    """The run that a file of mergekit describes; reads the headers of its base.

    Paths are relative to the current folder, as in mergekit, or else to the file's folder.

    Args:
        overrides: keys of our run, as for `load_run`.

    Raises:
        RunError: with everything that is not supported, by name.
        CheckpointError: if the base cannot be found or read.
    """
    file = parse(MergekitFile, data, where=f"{path}, a run of mergekit")
    check_file(file)
    keys = _translated(file, path)
    for key, value in (overrides or {}).items():
        assign(keys, key, value)
    return parse(MergeRun, keys, where=str(path))


def _translated(file: MergekitFile, path: Path) -> dict[str, Any]:
    """The keys of our run."""
    listed = [source.model for source in (file.models or (file.slices or [])[0].sources)]
    if file.base_model is None and file.merge_method not in NEEDS_NO_BASE:
        raise RunError(f"`{file.merge_method}` needs a base model", where="base_model", fix="add `base_model`")
    reference = file.base_model or listed[0].partition("+")[0]
    if "+" in reference:
        fix = "give a whole model as base, and the adapter as a model"
        raise RunError("the base is an adapter on a model", where="base_model", fix=fix)
    located = locate(_resolved(reference, path), weights=False)
    base = open_checkpoint(located.folder, located.remote)
    slices = slices_of(file, base.layers.blocks)
    models = [source.model for source in slices[0].sources]
    if len(set(models)) != len(models):
        raise RunError("a model is listed twice", where="models", fix="list each model once, with the sum of its weights")
    if file.slices is not None and file.base_model is not None and file.base_model not in models:
        raise RunError("the base model is not among the slices' sources", where="slices", fix="add it to the sources of every slice")
    experts = [model for model in models if file.merge_method in MERGES_BASE or model != file.base_model]
    outcomes: dict[str, Outcome] = {}
    for name, stored in base.tensors.items():
        if stored.spec.is_float:
            weights, options = _outcome(file, values_of(file, slices, name, base.layers), experts, name)
            outcomes[name] = (weights, json.dumps(options, sort_keys=True))
    dtype = (file.out_dtype or file.dtype or "auto").removeprefix("torch.")
    return {
        "base": _resolved(reference, path),
        "experts": _entries(experts, reference, path),
        "method": file.merge_method,
        "vocabulary": _vocabulary(file, reference, experts),
        "out": {"dtype": dtype},
        **_composed(outcomes, base),
    }


def _outcome(file: MergekitFile, values: Values, experts: Sequence[str], tensor: str) -> tuple[tuple[float, ...], dict[str, Any]]:
    """Our weights for one tensor, which sum to 1, and our options."""
    method, shared = file.merge_method, values.shared
    if method == "slerp":
        t = shared["t"]
        if not 0 <= t <= 1 or len(experts) != 2:
            what = f"t is {t}" if len(experts) == 2 else f"there are {len(experts)} models"
            raise RunError(f"slerp needs two models and t from 0 to 1: {what}", where=tensor, fix="give two models, and t from 0 to 1")
        return tuple(1 - t if model == file.base_model else t for model in experts), {}
    if method in ("karcher", "model_stock", "sce"):
        options = {"model_stock": {"vectors": "rows" if shared.get("filter_wise") else "whole"}, "karcher": {}}
        return (1 / len(experts),) * len(experts), options.get(method, {"density": shared.get("select_topk")})
    weights = [values.by_model[model]["weight"] for model in experts]
    if min(weights) < 0:
        fix = "weights must be 0 or more here; merge a model that is to be subtracted on its own"
        raise RunError(f"a weight is negative: {min(weights)}", where=tensor, fix=fix)
    total = sum(weights)
    shares = tuple(weight / total if total else 1 / len(weights) for weight in weights)
    if method == "nuslerp":
        vectors = "whole" if shared["nuslerp_flatten"] else "columns" if shared["nuslerp_row_wise"] else "rows"
        return shares, {"sphere": "weights" if file.base_model is None else "deltas", "vectors": vectors}
    if method == "linear":
        if (not shared["normalize"] and abs(total - 1) > 1e-6) or total == 0:
            what = f"the weights sum to {total:g}, so the result would be {total:g} times a mean of the models"
            raise RunError(what, where=tensor, fix="leave `normalize` at true, or use task_arithmetic with a base model")
        return shares, {}
    return shares, _of_task_vectors(method, values, experts, total)


def _of_task_vectors(method: str, values: Values, experts: Sequence[str], total: float) -> dict[str, Any]:
    """Options of the methods that sum deltas. The sum of mergekit's weights becomes part of our scale, unless the method divides by it."""
    shared = values.shared
    scale = shared["lambda"] * ((total > 0) if shared["normalize"] else total)
    if method == "task_arithmetic":
        return {"scale": scale / len(experts)}
    names = [name for name in values.by_model[experts[0]] if name != "weight"]
    own = {name: [values.by_model[model][name] for model in experts] for name in names}
    options: dict[str, Any] = {name: numbers[0] if len(set(numbers)) == 1 else numbers for name, numbers in own.items()}
    options |= {"rescale": "l1" if shared["rescale"] else "none", "scale": scale}
    return options | ({"mean": "weights" if shared["normalize"] else "none"} if method in ELECTS_SIGNS else {})


def _composed(outcomes: Mapping[str, Outcome], base: Checkpoint) -> dict[str, Any]:
    """Weights, options and parts of a run that gives every tensor its outcome. A layer has the outcome of most of its tensors."""
    layers = base.layers
    counts: list[Counter[Outcome]] = [Counter() for _ in range(layers.last + 1)]
    for name, outcome in outcomes.items():
        counts[layers.of(name)][outcome] += 1
    everywhere = Counter(outcomes.values())
    by_layer = [(count or everywhere).most_common(1)[0][0] for count in counts]
    options = Counter(own for _, own in by_layer).most_common(1)[0][0]
    of_tensors: dict[Outcome, list[str]] = {}
    for name, outcome in outcomes.items():
        if outcome != by_layer[layers.of(name)]:
            of_tensors.setdefault(outcome, []).append(name)
    of_layers: dict[str, list[int]] = {}
    for layer, (_, own) in enumerate(by_layer):
        if own != options:
            of_layers.setdefault(own, []).append(layer)
    rows = [list(weights) for weights, _ in by_layer]
    parts = [{"filter": names, "weights": list(weights), "options": json.loads(own)} for (weights, own), names in of_tensors.items()]
    parts += [{"layers": numbers, "options": json.loads(own)} for own, numbers in of_layers.items()]
    return {
        "weights": rows[0] if all(row == rows[0] for row in rows) else {"by_layer": rows},
        "options": json.loads(options),
        "parts": parts,
    }


def _entries(experts: Sequence[str], base: str, path: Path) -> list[dict[str, Any]]:
    """The experts, named after their folders."""
    entries: list[dict[str, Any]] = []
    for reference in experts:
        model, plus, adapter = reference.partition("+")
        if plus and model != base:
            what = f"'{adapter}' is an adapter on another model than the base"
            raise RunError(what, where="models", fix=f"merge it into '{model}' first, or give '{model}' as `base_model`")
        resolved = _resolved(adapter if plus else model, path)
        name = stem = resolved.rstrip("/").rpartition("/")[2].partition("@")[0] or "model"
        number = 1
        while name == "base" or name in [entry["name"] for entry in entries]:
            number += 1
            name = f"{stem}-{number}"
        entries.append({"name": name, "path": resolved, "same_base": bool(plus), "is_base": reference == base})
    return entries


def _vocabulary(file: MergekitFile, base: str, experts: Sequence[str]) -> str | None:
    source = file.tokenizer.source if file.tokenizer is not None else file.tokenizer_source
    if source is None or source in ("base", "union"):
        return source
    if source in (base, experts[-1].partition("+")[0]):
        return "base" if source == base else "newest"
    fix = "give `base`, `union`, or the last model"
    raise RunError(f"the tokenizer of '{source}' cannot be used", where="tokenizer_source", fix=fix)


def _resolved(reference: str, path: Path) -> str:
    """A path in the current folder or beside the file; anything else is a hub name, and unchanged."""
    here = path_of(reference)
    return next((str(place) for place in (here, path.parent / here) if exists(place)), reference)
