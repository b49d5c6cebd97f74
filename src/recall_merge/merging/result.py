"""A result and its record: what it was made from, hub models by commit and all else by hash; and the same, opened again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from recall_merge.files.adapter import CONFIG, WEIGHTS, is_adapter
from recall_merge.files.checkpoint import Checkpoint, open_checkpoint
from recall_merge.files.companions import hash_texts
from recall_merge.files.experts import BaseExpert, FullExpert
from recall_merge.files.hashing import ModelDigest, hash_file
from recall_merge.files.hub import Located, locate
from recall_merge.files.record import RECORD, versions
from recall_merge.files.same_architecture import named_like
from recall_merge.maths.weights import lines_scales
from recall_merge.merging.plan import Plan
from recall_merge.merging.run import skipped
from recall_merge.merging.samples import TypicalSample
from recall_merge.merging.tensors import condition_numbers
from recall_merge.merging.verify import verify
from recall_merge.merging.weights import MergeWeights
from recall_merge.runtime.errors import Fault, Faults, ResultError


def inputs_for_record(plan: Plan) -> dict[str, Any]:
    """The resolved run, its method, hashes of rows and texts, device and versions: known before any work, and equal for equal work."""
    run = plan.run.model_dump(mode="json", exclude={"threads", "device"})  # neither threads nor the number of a device change the result
    run["base"] = public_name(plan, "base")
    for entry in run["experts"]:
        entry["path"] = public_name(plan, entry["name"])
        entry["stats"] = entry["stats"] and Path(entry["stats"]).name  # local paths stay private
    run["out"]["path"] = plan.target.name
    rows: str | None = None
    if plan.run.samples is not None:
        data = Path(plan.run.samples.path)
        run["samples"]["path"] = data.name if data.exists() else plan.run.samples.path
        rows = plan.run.samples.digest(plan.rows)
    method = {"name": plan.name, "source": plan.source, "options": dict(plan.options)}
    texts = {"base": hash_texts(plan.base.folder), **{expert.name: hash_texts(expert.folder) for expert in plan.experts}}
    return {"run": run, "method": method, "rows_sha256": rows, "texts": texts, "device": plan.hardware, "versions": versions()}


def record_of(plan: Plan, weights: MergeWeights, digest: ModelDigest) -> dict[str, Any]:
    """All that a merge came from and came to; typical samples by the numbers of their rows, never their text."""
    record = {
        **inputs_for_record(plan),
        "models": hashes_of(plan, digest),
        "samples": [vars(sample) for sample in weights.samples],
        "weights": weights.table(weights.weights),
    }
    if weights.similarity is not None:
        record["similarity"] = weights.table(weights.similarity)
    if weights.losses is not None:
        record["losses"] = dict(weights.losses)
    if plan.overrides:
        record["parts"] = _overrides(plan)
    if plan.method.informed:  # what the statistics were made from, and a bound of the condition number of each system that they make
        known = {expert.name: stats.facts for expert, stats in zip(plan.experts, plan.statistics, strict=True) if stats}
        experts = {name: {key: facts[key] for key in ("samples", "tokens", "rank")} for name, facts in known.items()}
        record["statistics"] = {"experts": experts, "condition": condition_numbers(plan, weights)}
    return {**record, "notes": [*plan.notes, *weights.notes]}


def _overrides(plan: Plan) -> list[dict[str, Any]]:
    """What the run's parts came to: tensors that share weights or options of their own, grouped."""
    groups: dict[str, dict[str, Any]] = {}
    for name in plan.specs:
        if (override := plan.overrides.get(name)) is not None and plan.merges(name):
            settings: dict[str, Any] = {} if override.weights is None else {"weights": list(override.weights)}
            settings |= {"options": dict(override.options)} if override.options else {}
            groups.setdefault(json.dumps(settings, sort_keys=True), {"tensors": [], **settings})["tensors"].append(name)
    return [*groups.values()]


def weights_from_record(record: Mapping[str, Any]) -> MergeWeights:
    """The weights, similarity and samples of a record."""

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
                expert.digest.add(name, expert.source.read(name))
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


_Size = Annotated[int, Field(ge=0, lt=2**63)] | None


class _Section(BaseModel):
    """The keys of a record that are read here. Their types are checked: a record may come from anybody."""

    model_config = ConfigDict(extra="ignore", strict=True)


class _Entry(_Section):
    name: str
    path: str


class _Run(_Section):
    base: str
    experts: list[_Entry] = Field(min_length=1)
    skip: list[str]
    vocabulary: str | None


class _Method(_Section):
    name: str
    options: dict[str, Any]


class _Sample(_Section):
    model_config = ConfigDict(extra="forbid", strict=True)

    row: int
    tokens: int
    cluster: int


class _Table(_Section):
    experts: list[str]
    layers: list[int]
    rows: list[list[float]]

    @model_validator(mode="after")
    def _one_number_each(self) -> _Table:
        if not self.rows or len(self.rows) != len(self.layers):
            raise ValueError("a table has one row for each layer")
        if any(len(row) != len(self.experts) for row in self.rows):
            raise ValueError("a row has one number for each expert")
        return self


class _Record(_Section):
    run: _Run
    method: _Method
    models: dict[str, dict[str, str]]
    samples: list[_Sample]
    weights: _Table
    similarity: _Table | None = None

    @model_validator(mode="after")
    def _every_model(self) -> _Record:
        if missing := {"base", *(entry.name for entry in self.run.experts)} - set(self.models):
            raise ValueError(f"there are no hashes of '{min(missing)}'")
        return self


class _ShownRun(_Section):
    seed: int


class _ShownMethod(_Section):
    source: str


class _Bytes(_Section):
    read: _Size = None


class _Solved(_Section):
    condition: dict[str, float] = {}


class _Shown(_Section):
    """What a page shows besides."""

    run: _ShownRun
    method: _ShownMethod
    created: str
    versions: dict[str, str]
    seconds: dict[str, float]
    notes: list[str]
    bytes: _Bytes = _Bytes()
    peak_memory: _Size = None
    statistics: _Solved = _Solved()


@dataclass(frozen=True)
class Result:
    """A result and its record."""

    folder: Path
    record: Mapping[str, Any]
    checkpoint: Checkpoint

    @property
    def run(self) -> Mapping[str, Any]:
        return self.record["run"]

    @property
    def experts(self) -> list[str]:
        """The experts' names, in the order of the run."""
        return [entry["name"] for entry in self.run["experts"]]

    @property
    def merge_weights(self) -> MergeWeights:
        return weights_from_record(self.record)

    def merges(self, name: str) -> bool:
        """Whether a tensor was merged, or kept from the base."""
        return self.checkpoint.tensors[name].spec.is_float and not skipped(name, self.run["skip"])

    def is_adapter(self, expert: str) -> bool:
        return CONFIG in self.record["models"][expert]

    def named(self, model: str) -> str:
        """The record's name of a model: a hub name with its commit, or the bare name of a folder."""
        paths = {"base": self.run["base"], **{entry["name"]: entry["path"] for entry in self.run["experts"]}}
        return paths[model]


def open_result(folder: Path, *, shown: bool = False) -> Result:
    """Open a result that still matches its record. ResultError names every file that is missing, changed or new, or what is damaged."""
    record = verify(folder)
    check_record(record, folder, shown=shown)
    return Result(folder, record, open_checkpoint(folder))


def check_record(record: Mapping[str, Any], folder: Path, *, shown: bool = False) -> None:
    """Check what is read of a record, and what a page shows of it if it is `shown`. Raises ResultError with all that is damaged."""
    fix = "give the folder of a result of `recall merge`, as it was made"
    try:
        checked = _Record.model_validate(record)
        if shown:
            _Shown.model_validate(record)
    except ValidationError as error:
        what = [(".".join(map(str, detail["loc"])), detail["msg"]) for detail in error.errors()]
        raise ResultError(Fault(f"the record is damaged: {key}: {message}", str(folder / RECORD), fix) for key, message in what) from None
    if missing := {entry.name for entry in checked.run.experts} - set(checked.weights.experts):
        raise ResultError(f"the record is damaged: it has no weights of '{min(missing)}'", where=folder / RECORD, fix=fix)


def coefficients(result: Result) -> Tensor | None:
    """The coefficients c of a result that is a weighted sum: theta = theta_0 + sum_q c_q delta_q.    -> (L + 2, k)

    Weights, the method's scale and the layers' scale, in one number each. None where the method or pruning makes more than a sum,
    and where some tensors have weights or options of their own.
    """
    method, k = result.record["method"], len(result.experts)
    options, merge_weights = method["options"], result.merge_weights
    scales = {"linear": "scale", "recall": "scale", "task_arithmetic": "scale", "wise_ft": "alpha"}
    if method["name"] not in scales or result.run.get("prune") is not None or result.run.get("parts"):
        return None
    scale = options[scales[method["name"]]] * (k if method["name"] == "task_arithmetic" else 1)
    by_layer = torch.tensor([merge_weights.of_experts(layer) for layer in range(len(merge_weights.weights))], dtype=torch.float64)
    if (lines := result.run.get("scale_by_layer")) is not None:
        scales_by_layer = lines_scales(result.checkpoint.layers.blocks, **lines)
        by_layer = by_layer * torch.tensor(scales_by_layer, dtype=torch.float64).unsqueeze(1)
    return scale * by_layer


def find_models(result: Result, names: Sequence[str], given: Mapping[str, str], *, fetch: bool = True) -> dict[str, Located | str]:
    """Find models of a result: where the user says (name -> folder or hub name), on the hub at the record's commit, or in this folder.

    Without `fetch`, hub models are returned by name and commit, which identify their bytes. ResultError names all that cannot be found.
    """
    faults, models = Faults(), {}
    for name in given:
        if name not in ("base", *result.experts):
            faults.add(f"the result has no expert '{name}'", where=result.folder, fix=f"its experts are {', '.join(result.experts)}")
    for name in names:
        reference = given.get(name, result.named(name))
        if name not in given and "@" in reference and not fetch:
            models[name] = reference
        elif name in given or "@" in reference or Path(reference).is_dir():
            with faults.collect():
                models[name] = locate(reference)
        else:
            what = f"the record knows {_words(name)} only by the name of its folder, '{reference}', which is not here"
            faults.add(what, where=result.folder, fix="give --base FOLDER" if name == "base" else f"give --expert {name}=FOLDER")
    faults.raise_any(ResultError)
    return models


def check_model(result: Result, name: str, folder: Path) -> None:
    """Read a whole model. ResultError if it is not the one that the result was made from, or has changed."""
    if is_adapter(folder):
        hashes = {file: hash_file(folder / file) for file in (CONFIG, WEIGHTS) if (folder / file).is_file()}
    else:
        digest, model = ModelDigest(), named_like(open_checkpoint(folder), result.checkpoint)
        for tensor in model.tensors:
            if name == "base" or (tensor in result.checkpoint.tensors and result.merges(tensor)):
                digest.add(tensor, model.read(tensor))
        hashes = {"tensors": digest.hexdigest()}
    if hashes != result.record["models"][name]:
        what = f"this is not {_words(name)} that the result was made from, or it has changed"
        raise ResultError(what, where=folder, fix="give the model of the record, or merge again")


def _words(name: str) -> str:
    return "the base" if name == "base" else f"the expert '{name}'"
