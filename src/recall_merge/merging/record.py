"""The record of a merge: what the result was made from, without local paths: hub models by commit, all else by hash."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from recall_merge.files.digest import ModelDigest
from recall_merge.files.experts import BaseExpert, FullExpert
from recall_merge.files.hashing import hash_file
from recall_merge.files.record import versions
from recall_merge.merging.plan import Plan
from recall_merge.merging.weights import MergeWeights, TypicalSample


def inputs_for_record(plan: Plan) -> dict[str, Any]:
    """The resolved run, its method, the hash of its rows, and versions: known before any work, and equal for equal work."""
    run = plan.run.model_dump(mode="json", exclude={"threads"})  # threads do not change the result
    run["base"] = public_name(plan, "base")
    for entry in run["experts"]:
        entry["path"] = public_name(plan, entry["name"])
        entry["stats"] = entry["stats"] and Path(entry["stats"]).name  # local paths stay private
    run["out"]["path"] = plan.target.name
    rows: str | None = None
    if plan.run.samples is not None:
        data = Path(plan.run.samples.path)
        run["samples"]["path"] = data.name if data.exists() else plan.run.samples.path
        rows = hash_file(data) if data.is_file() else None
    method = {"name": plan.name, "source": plan.source, "options": dict(plan.options)}
    return {"run": run, "method": method, "rows_sha256": rows, "versions": versions()}


def weights_for_record(merge_weights: MergeWeights) -> dict[str, Any]:
    """Weights, similarity and typical samples; rows by their numbers, never their text."""
    samples = [{"row": sample.row, "tokens": sample.tokens, "cluster": sample.cluster} for sample in merge_weights.samples]
    values: dict[str, Any] = {"samples": samples, "weights": merge_weights.table(merge_weights.weights)}
    if merge_weights.similarity is not None:
        values["similarity"] = merge_weights.table(merge_weights.similarity)
    if merge_weights.losses is not None:
        values["losses"] = dict(merge_weights.losses)
    return values


def overrides_for_record(plan: Plan) -> list[dict[str, Any]]:
    """What the run's parts came to: tensors that share weights or options of their own, grouped."""
    groups: dict[str, dict[str, Any]] = {}
    for name in plan.specs:
        if (override := plan.overrides.get(name)) is not None and plan.merges(name):
            settings: dict[str, Any] = {} if override.weights is None else {"weights": list(override.weights)}
            settings |= {"options": dict(override.options)} if override.options else {}
            groups.setdefault(json.dumps(settings, sort_keys=True), {"tensors": [], **settings})["tensors"].append(name)
    return [*groups.values()]


def weights_from_record(record: Mapping[str, Any]) -> MergeWeights:
    """The reverse of `weights_for_record`."""

    def table(name: str) -> Any:
        return torch.tensor(record[name]["rows"], dtype=torch.float64) if name in record else None

    samples = tuple(TypicalSample(**sample) for sample in record["samples"])
    return MergeWeights(tuple(record["weights"]["experts"]), table("weights"), table("similarity"), samples, losses=record.get("losses"))


def hash_models(plan: Plan) -> dict[str, dict[str, str]]:
    """Hash all models by reading them: the same tensors as the pass over the parameters reads."""
    digest = ModelDigest()
    for name in plan.specs:
        digest.add(name, plan.base.read(name))
        for expert in plan.experts:
            if isinstance(expert, FullExpert) and plan.merges(name):
                expert.digest.add(name, expert.checkpoint.read(name))
    return hashes_of(plan, digest)


def hashes_of(plan: Plan, digest: ModelDigest) -> dict[str, dict[str, str]]:
    """The hashes of all models, once a pass has read them; `digest` holds the base's."""
    merged = {"tensors": digest.hexdigest(plan.merges)}  # of an expert, only what is merged is read
    experts = {expert.name: merged if isinstance(expert, BaseExpert) else expert.hashes() for expert in plan.experts}
    return {"base": {"tensors": digest.hexdigest()}, **experts}


def public_name(plan: Plan, name: str) -> str:
    """A model's name in public: its hub name and commit, or the bare name of its folder."""
    model = plan.located[name]
    return f"{model.repo}@{model.revision}" if model.repo else model.folder.resolve().name
