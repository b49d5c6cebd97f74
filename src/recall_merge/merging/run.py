"""A run, typed: what `recall merge` is told. Strict: an unknown key is refused, and models and data have no defaults."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from recall_merge.runtime.paths import exists, path_of
from recall_merge.runtime.sections import NonNegative, Positive, Section, assign, parse, read_mapping

Kind = Literal["attention", "mlp", "norm", "embedding", "head", "other"]
MAX_PATH = 4096  # letters, as file systems have it
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def _bytes(value: Any) -> Any:
    """'5GB' -> 5000000000; decimal units, as the hub counts."""
    if isinstance(value, bool):
        return "true or false"  # is no number of bytes, though Python takes it for one
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]?B?)\s*", str(value), re.IGNORECASE)
    unit = match[2].upper() if match else ""
    return int(float(match[1]) * _UNITS[unit if unit.endswith("B") or not unit else unit + "B"]) if match else value


class ExpertEntry(Section):
    name: str = Field(min_length=1, description="its name, everywhere")
    path: str = Field(
        min_length=1, max_length=MAX_PATH, description="a folder or hub name: a full checkpoint or an adapter, told from its files"
    )
    stats: str | None = Field(None, description="folder of its statistics, if that does not lie in its own")
    same_base: bool = Field(False, description="an adapter was trained on the run's base, although its config names another")
    is_base: bool = Field(False, description="it is the base itself, meant as one of the models that are merged")


class Samples(Section):
    """The newest expert's own data, and how its typical samples are chosen."""

    path: str = Field(description="rows of the newest expert's data: .jsonl, .json, .parquet, or a `datasets` name")
    split: str = Field("train", description="split, for a `datasets` name")
    count: int = Field(20, ge=1, description="typical samples, the paper's m")
    pool: int = Field(2000, ge=1, description="rows that are embedded at most; the first of a shuffle keyed by the seed")
    space: Literal["last", "middle", "several"] = Field("last", description="layer whose embedding is clustered")
    max_tokens: int = Field(512, ge=1, description="longer rows are cut")
    template: bool = Field(True, description="apply the model's chat template where it has one")


class RecallWeights(Section):
    """How representations become weights: the open choices of RECALL, each at its default (arXiv:2510.20479, as reconstructed)."""

    compares: ClassVar[str] = "representations"

    kernel: Literal["rbf", "cka", "cosine"] = Field("rbf", description="similarity of two models' representations")
    bandwidth: Literal["median", "dimension"] | Positive = Field("median", description="sigma of the rbf kernel: a rule, or a number")
    temperature: Positive = Field(1.0, description="tau of the softmax; smaller sharpens")
    pooling: Literal["mean", "last"] = Field("mean", description="over a sample's tokens: their masked mean, or the last of them")
    base_in_pool: Literal["single", "always", "never"] = Field(
        "single", description="the base as one of the models: beside a single expert only, or always, or never"
    )
    outside_blocks: Literal["nearest", "uniform", "newest"] = Field("nearest", description="weights of embedding, final norm and head")
    ablation: Literal["none", "uniform", "tilt", "ramp", "permuted"] = Field(
        "none", description="replace the weights by a ablation, to see if they matter"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the forward passes; pooling and what follows is float32 or better"
    )


class Losses(Section):
    """How losses become weights, one a model (LM-Cocktail, arXiv:2311.13534): of each expert on the newest one's typical samples."""

    compares: ClassVar[str] = "losses"

    temperature: Positive = Field(5.0, description="of the softmax over the negated losses; smaller sharpens")


class ByLoss(Section):
    """Weights from losses."""

    by_loss: Losses = Field(description="the options of weights from losses; {} for the defaults")


FromSamples = RecallWeights | Losses
"""Weights that models give, run on typical samples of the newest expert's rows."""


class Out(Section):
    path: Path | None = Field(None, description="folder of the result; needed by all that writes one")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto: tensor by tensor the base's own")
    shard_size: Annotated[int, BeforeValidator(_bytes), Field(gt=0)] = Field(5 * 10**9, description="bytes a file, at most; '5GB'")
    overwrite: bool = Field(False, description="replace a model that is there")
    reload: bool = Field(True, description="load the result and run it once before it is put in its place; needs memory for one model")


class ByLayer(Section):
    """Weights of one's own for every layer."""

    by_layer: list[list[NonNegative]] | dict[str, list[NonNegative]] = Field(
        description="one row a layer, 0..L+1, of one number an expert, as in a record; or the name of each expert with one number a layer"
    )


class Ramp(Section):
    """Weights that rise or fall from block to block."""

    ramp: dict[str, Annotated[list[NonNegative], Field(min_length=2)]] = Field(
        description="the name of each expert with two numbers or more, spread evenly over the blocks, straight lines between them; "
        "the embedding has those of the first block, final norm and head those of the last"
    )


class LayerScale(Section):
    """A scale on what the merge adds to the base, from block to block (LiNeS, arXiv:2410.17146)."""

    alpha: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(description="scale of the first block, and of the embedding")
    beta: Annotated[float, Field(allow_inf_nan=False)] = Field(
        description="what the last block has more; final norm and head are scaled as it is"
    )


class Prune(Section):
    """Redundant entries of each expert's deltas are set to 0 before the method (LwPTV, arXiv:2506.09093, as reconstructed)."""

    density: Annotated[float, Field(gt=0, le=1)] = Field(0.5, description="share of a tensor's entries that stay")
    saliency: Literal["apart", "size"] = Field(
        "apart", description="what stays: entries far from the mean of the experts' deltas, or large ones"
    )


def _kind_of_weights(value: Any) -> str:
    if isinstance(value, list):
        return "numbers"
    if isinstance(value, ByLayer) or (isinstance(value, Mapping) and "by_layer" in value):
        return "rows"
    if isinstance(value, Ramp) or (isinstance(value, Mapping) and "ramp" in value):
        return "points"
    if isinstance(value, ByLoss) or (isinstance(value, Mapping) and "by_loss" in value):
        return "losses"
    return "uniform" if isinstance(value, str) else "representations"


Weights = Annotated[
    Annotated[Literal["uniform"], Tag("uniform")]
    | Annotated[list[NonNegative], Tag("numbers")]
    | Annotated[RecallWeights, Tag("representations")]
    | Annotated[ByLayer, Tag("rows")]
    | Annotated[Ramp, Tag("points")]
    | Annotated[ByLoss, Tag("losses")],
    Discriminator(_kind_of_weights),
]


class Part(Section):
    """Some of the tensors, and what is different there: those that every selector given here selects."""

    filter: str | list[str] | None = Field(
        None, description="whole names of tensors, parts of names, or patterns with *; one of them must fit"
    )
    kind: Kind | list[Kind] | None = Field(None, description="attention, mlp, norm, embedding, head or other: told from the names")
    layers: list[Annotated[int, Field(ge=0)]] | None = Field(None, description="0 = embedding, 1..L = blocks, L + 1 = final norm and head")
    weights: (
        Annotated[
            Annotated[Literal["uniform"], Tag("uniform")]
            | Annotated[list[NonNegative], Tag("numbers")]
            | Annotated[ByLayer, Tag("rows")]
            | Annotated[Ramp, Tag("points")],
            Discriminator(_kind_of_weights),
        ]
        | None
    ) = Field(None, description="as the run's own; not from representations")
    options: dict[str, Any] = Field(default_factory=dict, description="options of the method")

    @model_validator(mode="after")
    def _says_something(self) -> Part:
        if self.filter is None and self.kind is None and self.layers is None:
            raise ValueError("a part needs `filter`, `kind` or `layers`")
        if self.weights is None and not self.options:
            raise ValueError("a part needs `weights` or `options`")
        return self


class MergeRun(Section):
    """One merge."""

    base: str = Field(min_length=1, max_length=MAX_PATH, description="folder, or hub name with optional @revision")
    experts: list[ExpertEntry] = Field(min_length=1, description="this order is the order everywhere; the last is the newest")
    method: str | None = Field(None, description="one of `recall methods`; left out, it is chosen, and the plan's notes say why")
    options: dict[str, Any] = Field(default_factory=dict, description="options of the method")
    weights: Weights = Field(
        "uniform",
        description="uniform, one number an expert, `by_layer`, `ramp`, `by_loss`, or RECALL's options; `method: recall` has its own",
    )
    parts: list[Part] = Field(
        default_factory=list, description="tensors with weights or options of their own; the first part that fits and says it, counts"
    )
    scale_by_layer: LayerScale | None = Field(None, description="scale what the merge adds to the base by layer, after any method")
    prune: Prune | None = Field(None, description="prune the experts' deltas, before any method")
    change_limit: Positive | None = Field(
        30.0, description="an expert that changes a tensor by over so many times the size of the base's numbers is refused; null: never"
    )
    samples: Samples | None = Field(None, description="needed where representations are compared")
    vocabulary: Literal["base", "newest", "union"] | None = Field(None, description="whose tokens, where tokenizers differ")
    skip: list[str] = Field(default_factory=list, description="tensors to keep from the base: names, or patterns with *")
    out: Out = Field(default_factory=lambda: Out.model_validate({}))
    seed: int = 0
    threads: int | None = Field(None, ge=1, description="default: one a core; does not change the result")

    @field_validator("experts")
    @classmethod
    def _distinct(cls, experts: list[ExpertEntry]) -> list[ExpertEntry]:
        for entry in experts:
            if [other.name for other in experts].count(entry.name) > 1 or entry.name == "base":
                raise ValueError(f"the name '{entry.name}' is taken twice" if entry.name != "base" else "'base' names the base")
        return experts


def load_run(path: Path, overrides: Mapping[str, Any] | None = None) -> MergeRun:
    """Read a run from YAML; a relative path in it is looked for from its own folder, then from the current one.

    Args:
        overrides: dotted keys of `--set`, e.g. {"options.temperature": 0.5}; they win over the file.

    Raises:
        RunError: with every fault of the file.
    """
    data = _relative_to(path.parent, read_mapping(path, "run", "docs/run.md"))
    for key, value in (overrides or {}).items():
        assign(data, key, value)
    return parse(MergeRun, data, where=str(path))


def _relative_to(folder: Path, data: dict[str, Any]) -> dict[str, Any]:
    """Paths in a run file are meant from where the file lies; hub names are left alone."""

    def resolved(section: Any, *keys: str) -> Any:
        if not isinstance(section, dict):
            return section
        found = {key: section[key] for key in keys if isinstance(section.get(key), str) and section[key]}
        there = {key: folder / path_of(value) for key, value in found.items()}
        return section | {key: str(place) for key, place in there.items() if exists(place)}

    data = resolved(data, "base")
    if isinstance(data.get("experts"), list):
        data["experts"] = [resolved(entry, "path", "stats") for entry in data["experts"]]
    if "samples" in data:
        data["samples"] = resolved(data["samples"], "path")
    if isinstance(data.get("out"), dict) and isinstance(data["out"].get("path"), str):
        data["out"] = {**data["out"], "path": os.path.normpath(folder / path_of(data["out"]["path"]))}
    return data
