"""What a result was made from, in words that may be published: no path of a machine, hub models by their commit, all else by hashes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recall_merge.files.experts import BaseExpert, Digest, FullExpert, hash_file
from recall_merge.files.record import versions
from recall_merge.merging.plan import Plan
from recall_merge.merging.samples import TypicalSample
from recall_merge.merging.weights import MergeWeights


def made_from(plan: Plan) -> dict[str, Any]:
    """The run, resolved; its method; the hash of its rows; the versions at work. Known before any work, and the same for the same work."""
    run = plan.run.model_dump(mode="json", exclude={"threads"})  # threads do not change the result
    run["base"] = public_name(plan, "base")
    for entry in run["experts"]:
        entry["path"] = public_name(plan, entry["name"])
        entry["stats"] = entry["stats"] and Path(entry["stats"]).name  # a place of this machine is nobody else's business
    run["out"]["path"] = plan.target.name
    rows: str | None = None
    if plan.run.samples is not None:
        data = Path(plan.run.samples.path)
        run["samples"]["path"] = data.name if data.exists() else plan.run.samples.path
        rows = hash_file(data) if data.is_file() else None
    method = {"name": plan.method.name, "source": plan.method.source, "options": dict(plan.options)}
    return {"run": run, "method": method, "rows_sha256": rows, "versions": versions()}


def made_of(merge_weights: MergeWeights) -> dict[str, Any]:
    """Weights, similarity and typical samples, as the record keeps them; rows by their numbers, never their text."""
    samples = [{"row": sample.row, "tokens": sample.tokens, "cluster": sample.cluster} for sample in merge_weights.samples]
    found: dict[str, Any] = {"samples": samples, "weights": merge_weights.table(merge_weights.weights)}
    if merge_weights.similarity is not None:
        found["similarity"] = merge_weights.table(merge_weights.similarity)
    if merge_weights.losses is not None:
        found["losses"] = dict(merge_weights.losses)
    return found


def made_apart(plan: Plan) -> list[dict[str, Any]]:
    """What the run's parts came to: tensors that have weights or options of their own, together where these are the same."""
    found: dict[str, dict[str, Any]] = {}
    for name in plan.specs:
        if (own := plan.own.get(name)) is not None and plan.merges(name):
            told = {**({} if own.weights is None else {"weights": list(own.weights)}), **({"options": own.options} if own.options else {})}
            found.setdefault(json.dumps(told, sort_keys=True), {"tensors": [], **told})["tensors"].append(name)
    return [*found.values()]


def weights_from_record(record: Mapping[str, Any]) -> MergeWeights:
    """The reverse of `made_of`."""
    import torch

    def table(name: str) -> Any:
        return torch.tensor(record[name]["rows"], dtype=torch.float64) if name in record else None

    samples = tuple(TypicalSample(**sample) for sample in record["samples"])
    return MergeWeights(tuple(record["weights"]["experts"]), table("weights"), table("similarity"), samples, losses=record.get("losses"))


def hash_models(plan: Plan) -> dict[str, dict[str, str]]:
    """What the record says of the models, from reading them: the same tensors as the pass over the parameters reads."""
    digest = Digest()
    for name in plan.specs:
        digest.add(name, plan.base.read(name))
        for expert in plan.experts:
            if isinstance(expert, FullExpert) and plan.merges(name):
                expert.digest.add(name, expert.checkpoint.read(name))
    return hashes_of(plan, digest)


def hashes_of(plan: Plan, digest: Digest) -> dict[str, dict[str, str]]:
    """What the record says of the models once they have been read; `digest` was told of the base's tensors."""
    merged = {"tensors": digest.hexdigest(plan.merges)}  # of an expert, only what is merged is read
    experts = {expert.name: merged if isinstance(expert, BaseExpert) else expert.hashes() for expert in plan.experts}
    return {"base": {"tensors": digest.hexdigest()}, **experts}


def public_name(plan: Plan, name: str) -> str:
    """How a model is called where others may read it: its hub name and commit, or the mere name of its folder."""
    place = plan.located[name]
    return f"{place.repo}@{place.revision}" if place.repo else place.folder.resolve().name
