"""A run, typed: what `recall merge` is told. Strict: an unknown key is refused, and models and data have no defaults."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from recall_merge.runtime.errors import Fault, RunError, did_you_mean, short
from recall_merge.runtime.paths import exists, path_of
from recall_merge.runtime.safe_yaml import NotYaml, read_yaml

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
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


class Section(BaseModel):
    """One part of a run: frozen, and strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ExpertEntry(Section):
    name: str = Field(min_length=1, description="its name, everywhere")
    path: str = Field(
        min_length=1, max_length=MAX_PATH, description="a folder or hub name: a full checkpoint or an adapter, told from its files"
    )
    card: str | None = Field(None, description="folder of its card, if that does not lie in its own")
    same_base: bool = Field(False, description="an adapter was trained on the run's base, although its config names another")
    is_base: bool = Field(False, description="it is the base itself, meant as one of the models that are merged")


class Samples(Section):
    """The newest expert's own data, and how its typical samples are chosen."""

    path: str = Field(description="rows of the newest expert's data: .jsonl, .json, .parquet, or a `datasets` name")
    split: str = Field("train", description="split, for a `datasets` name")
    count: int = Field(20, ge=1, description="typical samples, the paper's m")
    pool: int = Field(2000, ge=1, description="rows that are embedded at most; the first of a shuffle keyed by the seed")
    space: Literal["last", "middle", "several"] = Field("last", description="depth whose embedding is clustered")
    max_tokens: int = Field(512, ge=1, description="longer rows are cut")
    template: bool = Field(True, description="apply the model's chat template where it has one")


class Representations(Section):
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
    control: Literal["none", "uniform", "tilt", "ramp", "permuted"] = Field(
        "none", description="replace the weights by a control, to see if they matter"
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


FromSamples = Representations | Losses
"""Weights that models give, run on typical samples of the newest expert's rows."""


class Out(Section):
    path: Path | None = Field(None, description="folder of the result; needed by all that writes one")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto: tensor by tensor the base's own")
    shard_size: Annotated[int, BeforeValidator(_bytes), Field(gt=0)] = Field(5 * 10**9, description="bytes a file, at most; '5GB'")
    overwrite: bool = Field(False, description="replace a model that is there")
    reload: bool = Field(True, description="load the result and run it once before it is put in its place; needs memory for one model")


class ByDepth(Section):
    """Weights of one's own for every depth."""

    by_depth: list[list[Share]] | dict[str, list[Share]] = Field(
        description="one row a depth, 0..L+1, of one number an expert, as in a record; or the name of each expert with one number a depth"
    )


class Ramp(Section):
    """Weights that rise or fall from block to block."""

    ramp: dict[str, Annotated[list[Share], Field(min_length=2)]] = Field(
        description="the name of each expert with two numbers or more, spread evenly over the blocks, straight lines between them; "
        "the embedding has those of the first block, final norm and head those of the last"
    )


class DepthScale(Section):
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
    if isinstance(value, ByDepth) or (isinstance(value, Mapping) and "by_depth" in value):
        return "rows"
    if isinstance(value, Ramp) or (isinstance(value, Mapping) and "ramp" in value):
        return "points"
    if isinstance(value, ByLoss) or (isinstance(value, Mapping) and "by_loss" in value):
        return "losses"
    return "uniform" if isinstance(value, str) else "representations"


Weights = Annotated[
    Annotated[Literal["uniform"], Tag("uniform")]
    | Annotated[list[Share], Tag("numbers")]
    | Annotated[Representations, Tag("representations")]
    | Annotated[ByDepth, Tag("rows")]
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
    depths: list[Annotated[int, Field(ge=0)]] | None = Field(None, description="0 = embedding, 1..L = blocks, L + 1 = final norm and head")
    weights: (
        Annotated[
            Annotated[Literal["uniform"], Tag("uniform")]
            | Annotated[list[Share], Tag("numbers")]
            | Annotated[ByDepth, Tag("rows")]
            | Annotated[Ramp, Tag("points")],
            Discriminator(_kind_of_weights),
        ]
        | None
    ) = Field(None, description="as the run's own; not from representations")
    options: dict[str, Any] = Field(default_factory=dict, description="options of the method")

    @model_validator(mode="after")
    def _says_something(self) -> Part:
        if self.filter is None and self.kind is None and self.depths is None:
            raise ValueError("a part needs `filter`, `kind` or `depths`")
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
        description="uniform, one number an expert, `by_depth`, `ramp`, `by_loss`, or RECALL's options; `method: recall` has its own",
    )
    parts: list[Part] = Field(
        default_factory=list, description="tensors with weights or options of their own; the first part that fits and says it, counts"
    )
    scale_by_depth: DepthScale | None = Field(None, description="scale what the merge adds to the base by depth, after any method")
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


M = TypeVar("M", bound=BaseModel)


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


def read_mapping(path: Path, kind: str, form: str) -> dict[str, Any]:
    """The keys of a YAML file that describes some kind of work.

    Args:
        form: the page that shows what such a file looks like.

    Raises:
        RunError: if there is no such file, or it holds no mapping.
    """
    try:
        data = read_yaml(path)
    except FileNotFoundError:
        raise RunError(f"there is no such {kind}", where=path, fix="give the path of a YAML file") from None
    except NotYaml as error:
        raise RunError(f"this is not readable YAML: {error}", where=path, fix=f"see {form} for the form") from error
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise RunError(f"a {kind} is a mapping of keys to values", where=path, fix=f"see {form} for the form")
    return data


def parse(model: type[M], data: Any, *, where: str) -> M:
    """Validate data, turning every fault of pydantic's into one of ours.

    Raises:
        RunError: with all of them; an unknown key comes with a suggestion.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise RunError(_fault(model, detail, where) for detail in error.errors()) from None


def _fault(model: type[BaseModel], detail: Any, where: str) -> Fault:
    named = detail["type"] in {"extra_forbidden", "missing"}  # then the last part is a key, whatever it is called
    last = len(detail["loc"]) - 1
    place = [part for at, part in enumerate(detail["loc"]) if (named and at == last) or not _is_union_branch(part)]
    key = ".".join(map(str, place))
    if detail["type"] == "extra_forbidden":
        return Fault(f"unknown key '{key}'", where, did_you_mean(str(place[-1]), _known_keys(model, place[:-1])))
    if detail["type"] == "missing":
        return Fault(f"'{key}' is missing", where, "add it")
    return Fault(f"'{key}': {detail['msg'].removeprefix('Value error, ')}", where, f"it is {short(detail['input'])} now")


def _is_union_branch(part: Any) -> bool:
    """pydantic names the branch of a union that it tried; a reader of YAML need not know."""
    return part in {"uniform", "numbers", "rows", "points", "losses", "representations", "constrained-float", "float"} or (
        isinstance(part, str) and "[" in part
    )


def _known_keys(model: type[BaseModel], place: list[Any]) -> list[str]:
    """The keys that are allowed at a place of a model."""
    for part in place:
        if part in model.model_fields:
            model = next(_sections(model.model_fields[part].annotation), model)
    return list(model.model_fields)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections named in an annotation, however deep: in a list, a union, an `Annotated`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)


def assign(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested mappings."""
    *parents, last = key.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise RunError(f"--set {key}: '{parent}' is not a mapping", fix="set the key itself")
    data[last] = value


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
        data["experts"] = [resolved(entry, "path", "card") for entry in data["experts"]]
    if "samples" in data:
        data["samples"] = resolved(data["samples"], "path")
    if isinstance(data.get("out"), dict) and isinstance(data["out"].get("path"), str):
        data["out"] = {**data["out"], "path": os.path.normpath(folder / path_of(data["out"]["path"]))}
    return data
