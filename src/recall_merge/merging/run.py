"""A run, typed: one YAML file that describes one merge. Unknown keys are refused; models and data have no defaults."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

from recall_merge.files.row_sources import RowSource, Template
from recall_merge.runtime.device import DeviceName
from recall_merge.runtime.errors import did_you_mean
from recall_merge.runtime.paths import exists, path_of
from recall_merge.runtime.sections import NonNegative, Positive, Section, assign, parse, read_mapping

Kind = Literal["attention", "mlp", "norm", "embedding", "head", "other"]
MAX_PATH = 4096  # letters, as file systems have it
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def _bytes(value: Any) -> Any:
    """'5GB' -> 5000000000; decimal units, as the hub counts."""
    if isinstance(value, bool):
        return "true or false"  # Python would take a bool for a number
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]?B?)\s*", str(value), re.IGNORECASE)
    unit = match[2].upper() if match else ""
    return int(float(match[1]) * _UNITS[unit if unit.endswith("B") or not unit else unit + "B"]) if match else value


class ExpertEntry(Section):
    """One fine-tuned model."""

    name: str = Field(min_length=1, description="its name, everywhere")
    path: str = Field(
        min_length=1, max_length=MAX_PATH, description="folder or hub name: a full checkpoint or an adapter, told from its files"
    )
    stats: str | None = Field(None, description="folder of its input statistics, if they are not in its own folder")
    same_base: bool = Field(False, description="accept an adapter whose config names another base: it was trained on the run's base")
    is_base: bool = Field(False, description="the expert is the base itself, listed on purpose as one of the models to merge")


Space = Literal["embedding", "middle", "last", "several"]
STATISTICS_SPACE: Space = "embedding"  # of input statistics: no block runs for it, and the samples stand for the rest as well (docs/log.md)


class Samples(RowSource):
    """The newest expert's own data, and how its typical samples are chosen."""

    count: int = Field(20, ge=1, description="number of typical samples, the paper's m")
    pool: int = Field(2000, ge=1, description="maximum rows to embed, drawn by the seed")
    space: Space | None = Field(
        None,
        description="hidden states that are clustered; by default those of the last layer for weights, embeddings for statistics",
    )
    max_tokens: int = Field(512, ge=1, description="longer rows are cut")
    template: Template = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        True, description="apply the model's chat template where it has one; or that of a Jinja file"
    )


def _check_kernel(name: str) -> str:
    from recall_merge.maths.similarity import KERNELS

    if name not in KERNELS:
        raise PydanticCustomError("kernel", "there is no kernel '{name}'", {"name": name, "fix": did_you_mean(name, KERNELS)})
    return name


class RecallWeights(Section):
    """How hidden states become weights: RECALL's open choices, each at its default (arXiv:2510.20479, as reconstructed)."""

    compares: ClassVar[str] = "hidden states"

    kernel: Annotated[str, AfterValidator(_check_kernel)] = Field("rbf", description="kernel that compares two models' hidden states")
    bandwidth: Literal["median", "dimension"] | Positive = Field(
        "median", description="sigma of kernels that have one: a rule, or a number"
    )
    temperature: Positive = Field(1.0, description="tau of the softmax; smaller values sharpen the weights")
    pooling: Literal["mean", "last"] = Field("mean", description="over a sample's tokens: the masked mean, or the last token")
    base_in_pool: Literal["single", "always", "never"] = Field(
        "single", description="compare the base too: beside a single expert only, always, or never"
    )
    outside_blocks: Literal["nearest", "uniform", "newest"] = Field("nearest", description="weights of embedding, final norm and head")
    ablation: Literal["none", "uniform", "tilt", "ramp", "permuted"] = Field(
        "none", description="replace the weights by others that ignore the hidden states, to see whether these matter"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the forward passes; everything after them is float32 or better"
    )


class LossWeights(Section):
    """How losses become weights, one per model (LM-Cocktail, arXiv:2311.13534)."""

    compares: ClassVar[str] = "losses"

    temperature: Positive = Field(5.0, description="of the softmax over the negated losses; smaller values sharpen the weights")


DEFAULT_RECALL = RecallWeights.model_validate({})
"""How samples are chosen and models run where weights do not come from hidden states: as RECALL does by default."""


class FromHiddenStates(Section):
    """Weights per layer, from the similarity of hidden states."""

    recall: RecallWeights = Field(description="RECALL's options; {} for the defaults")


class FromLosses(Section):
    """One weight per model, from its loss on the typical samples."""

    losses: LossWeights = Field(description="options of weights from losses; {} for the defaults")


SampleWeights = RecallWeights | LossWeights
"""Rules for weights that need the newest expert's rows: the models are run on its typical samples."""


class Out(Section):
    path: Path | None = Field(None, description="folder of the result")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto: each tensor keeps the base's")
    chat_template: str | None = Field(
        None,
        description="whose chat template and end tokens the result has: `base`, `newest` or an expert's name; "
        "default: the model whose tokens it has",
    )
    shard_size: Annotated[int, BeforeValidator(_bytes), Field(gt=0)] = Field(5 * 10**9, description="maximum bytes per file, such as '5GB'")
    overwrite: bool = Field(False, description="replace a model that is already there")
    reload: bool = Field(
        False, description="always load the result and run it once before it is put in its place; needs memory for one model"
    )


class ByLayer(Section):
    """Given weights, layer by layer."""

    by_layer: list[list[NonNegative]] | dict[str, list[NonNegative]] = Field(
        description="layers 0..L+1: one row per layer with one number per expert, as in a record; or one list per expert name"
    )


class Ramp(Section):
    """Weights that rise or fall from block to block."""

    ramp: dict[str, Annotated[list[NonNegative], Field(min_length=2)]] = Field(
        description="per expert name, two or more numbers spread evenly over the blocks and joined by straight lines; "
        "the embedding has the first block's, final norm and head the last block's"
    )


class LayerScale(Section):
    """A scale on what the merge adds to the base, from block to block (LiNeS, arXiv:2410.17146)."""

    alpha: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(description="scale of the first block and of the embedding")
    beta: Annotated[float, Field(allow_inf_nan=False)] = Field(
        description="added to alpha, linearly, up to the last block; final norm and head are scaled like the last block"
    )


class Prune(Section):
    """Redundant entries of each expert's deltas are set to 0 before the method after the idea of LwPTV (arXiv:2506.09093)."""

    density: Annotated[float, Field(gt=0, le=1)] = Field(0.5, description="share of a tensor's entries that stay")
    saliency: Literal["deviation", "magnitude"] = Field(
        "deviation", description="what stays: entries far from the mean of the experts' deltas, or large ones (our own scores)"
    )


GIVEN_FORMS = {"by_layer": "<by_layer>", "ramp": "<ramp>"}
FORMS = {"recall": "<recall>", "losses": "<losses>", **GIVEN_FORMS}
"""Mappings that describe weights, by their one key; the tags name the branch of the union."""


def _form_of(value: Any, forms: Mapping[str, str]) -> str | None:
    if isinstance(value, str):
        return "<uniform>"
    if isinstance(value, list):
        return "<numbers>"
    return next((tag for key, tag in forms.items() if (key in value if isinstance(value, Mapping) else hasattr(value, key))), None)


def _discriminator(forms: Mapping[str, str]) -> Discriminator:
    names = ", ".join(f"`{key}`" for key in forms)
    message = f"weights are `uniform`, one number per expert, or a mapping with one of {names}"
    return Discriminator(lambda value: _form_of(value, forms), custom_error_type="weights", custom_error_message=message)


Given = (
    Annotated[Literal["uniform"], Tag("<uniform>")]
    | Annotated[list[NonNegative], Tag("<numbers>")]
    | Annotated[ByLayer, Tag("<by_layer>")]
    | Annotated[Ramp, Tag("<ramp>")]
)
Weights = Annotated[Given | Annotated[FromHiddenStates, Tag("<recall>")] | Annotated[FromLosses, Tag("<losses>")], _discriminator(FORMS)]


class Part(Section):
    """Some of the tensors, and what is different there. A tensor must fit every selector that is given."""

    filter: str | list[str] | None = Field(None, description="whole tensor names, parts of names, or patterns with *; one of them must fit")
    kind: Kind | list[Kind] | None = Field(None, description="attention, mlp, norm, embedding, head or other: told from the names")
    layers: list[Annotated[int, Field(ge=0)]] | None = Field(None, description="0 = embedding, 1..L = blocks, L + 1 = final norm and head")
    weights: Annotated[Given, _discriminator(GIVEN_FORMS)] | None = Field(None, description="as the run's own, but not from samples")
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
    method: str | None = Field(None, description="one of `recall methods`; if left out, it is chosen and the plan's notes say why")
    options: dict[str, Any] = Field(default_factory=dict, description="options of the method")
    weights: Weights = Field(
        "uniform", description="`uniform`, one number per expert, or one of `by_layer`, `ramp`, `recall`, `losses` with its options"
    )
    parts: list[Part] = Field(
        default_factory=list,
        description="tensors with weights or options of their own; for each setting the first part that fits and gives it counts",
    )
    scale_by_layer: LayerScale | None = Field(None, description="scale what the merge adds to the base, layer by layer, after any method")
    prune: Prune | None = Field(None, description="prune the experts' deltas, before any method")
    change_limit: Positive | None = Field(
        30.0,
        description="refuse an expert whose change to a tensor is more than this many times the size of the base's numbers; null: never",
    )
    samples: Samples | None = Field(None, description="the newest expert's rows; needed for weights from hidden states or losses")
    vocabulary: Literal["base", "newest", "union"] | None = Field(None, description="whose tokens, where tokenizers differ")
    skip: list[str] = Field(default_factory=list, description="tensors to keep from the base: names, or patterns with *")
    out: Out = Field(default_factory=lambda: Out.model_validate({}))
    seed: int = 0
    threads: int | None = Field(None, ge=1, description="default: one per core; does not change the result")
    device: DeviceName = Field(
        "auto",
        description="for forward passes and heavy methods: cpu, cuda, cuda:1, mps, xpu; auto: the first accelerator, or the processor",
    )

    @field_validator("experts")
    @classmethod
    def _distinct(cls, experts: list[ExpertEntry]) -> list[ExpertEntry]:
        for entry in experts:
            if [other.name for other in experts].count(entry.name) > 1 or entry.name == "base":
                raise ValueError(f"the name '{entry.name}' is taken twice" if entry.name != "base" else "'base' names the base")
        return experts


def skipped(name: str, patterns: Iterable[str]) -> bool:
    """Whether `skip` names a tensor, by its whole name or by a pattern with *.

    >>> skipped("model.norm.weight", ["*.norm.weight"])
    True
    """
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def load_run(path: Path, overrides: Mapping[str, Any] | None = None) -> MergeRun:
    """Read a run from YAML, or raise RunError with every fault of it. Overrides have the dotted keys of `--set`, and win over the file.

    Relative paths in the file are tried from its folder first, then from the current one.
    """
    data = _relative_to(path.parent, read_mapping(path, "run", "docs/run.md"))
    for key, value in (overrides or {}).items():
        assign(data, key, value)
    return parse(MergeRun, data, where=str(path))


def _relative_to(folder: Path, data: dict[str, Any]) -> dict[str, Any]:
    """Resolve the paths in a run file from the folder of the file; hub names stay as they are."""

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
        data["samples"] = resolved(data["samples"], "path", "template")
    if isinstance(data.get("out"), dict) and isinstance(data["out"].get("path"), str):
        data["out"] = {**data["out"], "path": os.path.normpath(folder / path_of(data["out"]["path"]))}
    return data
