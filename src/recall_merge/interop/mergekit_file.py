"""A run file of mergekit, another merging tool (github.com/arcee-ai/mergekit), as written: keys, and parameters tensor by tensor.

Filters, gradients and precedence are those of mergekit 0.1.5. What is not read is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from recall_merge.maths.layers import Layers
from recall_merge.merging.run import MAX_PATH
from recall_merge.runtime.errors import Faults, RunError, did_you_mean, short
from recall_merge.runtime.sections import Section

KEY = "merge_method"  # every run file of mergekit has it, and none of ours
Scalar = StrictBool | StrictInt | StrictFloat | StrictStr
Settings = Mapping[str, Any]


LayerNumber = Annotated[int, Field(ge=0, le=1_000_000)]


class Conditional(Section):
    value: Scalar | list[Scalar]
    filter: str | None = None


Setting = Conditional | Scalar | list[Conditional] | list[Scalar]


class InputModel(Section):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str = Field(min_length=1, max_length=MAX_PATH)
    parameters: dict[str, Setting] = {}


class Source(InputModel):
    layer_range: tuple[LayerNumber, LayerNumber]


class Slice(Section):
    sources: list[Source] = Field(min_length=1)
    base_model: str | None = Field(None, min_length=1, max_length=MAX_PATH)
    residual_weight: float | None = None
    parameters: dict[str, Setting] = {}


class Tokenizer(Section):
    source: str = "union"
    tokens: dict[str, Any] | None = None
    pad_to_multiple_of: int | None = None


class MergekitFile(Section):
    """The keys of the file."""

    merge_method: str
    models: list[InputModel] | None = Field(None, min_length=1)
    slices: list[Slice] | None = Field(None, min_length=1)
    modules: dict[str, Any] | None = None
    base_model: str | None = Field(None, min_length=1, max_length=MAX_PATH)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    parameters: dict[str, Setting] = {}


@dataclass(frozen=True)
class Parameter:
    """A parameter of one of mergekit's methods. One without a default is required."""

    default: float | bool | None = None
    per_model: bool = False
    of_base: bool = False
    """The base among the models has it too."""

    def read(self, value: Any, where: str) -> float | bool:
        """A value as mergekit takes it: a number may be written as text."""
        if isinstance(self.default, bool):
            if isinstance(value, bool) or value in (0, 1):
                return bool(value)
            raise RunError(f"{short(value)} is neither true nor false", where=where, fix="give true or false")
        try:
            return float(value)
        except (ValueError, OverflowError):
            raise RunError(f"{short(value)} is no number", where=where, fix="give a number") from None


_WEIGHT = {"weight": Parameter(per_model=True)}


def _task_vectors(normalize: bool, rescale: bool, **others: float) -> dict[str, Parameter]:
    shared = {"int8_mask": False, "normalize": normalize, "rescale": rescale, "lambda": 1.0}
    own = {"density": 1.0, **others}
    return _WEIGHT | {n: Parameter(v) for n, v in shared.items()} | {n: Parameter(v, per_model=True) for n, v in own.items()}


PARAMETERS: dict[str, dict[str, Parameter]] = {
    "linear": {"weight": Parameter(per_model=True, of_base=True), "normalize": Parameter(True)},
    "task_arithmetic": _task_vectors(False, False),
    "ties": _task_vectors(True, False),
    "dare_ties": _task_vectors(False, True),
    "dare_linear": _task_vectors(False, True),
    "breadcrumbs": _task_vectors(False, False, gamma=0.01),
    "breadcrumbs_ties": _task_vectors(False, False, gamma=0.01),
    "della": _task_vectors(True, True, epsilon=0.15),
    "della_linear": _task_vectors(False, True, epsilon=0.15),
    "slerp": {"t": Parameter()},
    "nuslerp": _WEIGHT | {"nuslerp_row_wise": Parameter(False), "nuslerp_flatten": Parameter(True)},
    "karcher": {},
    "model_stock": {"filter_wise": Parameter(False)},
    "sce": {"int8_mask": Parameter(False), "select_topk": Parameter(1.0)},
}
"""Of mergekit's methods, those that are read, with their parameters and mergekit's defaults."""


@dataclass(frozen=True)
class LayerSlice:
    """The models of some slices, and their parameters."""

    first: int
    last: int
    """The layer after the last one."""
    sources: Sequence[InputModel]
    parameters: Settings = field(default_factory=dict)

    def share(self, layer: int) -> float:
        """Where a layer lies, for gradients: 0 at the first, 1 at the last; a single one at 1."""
        return (layer - self.first) / (self.last - self.first - 1) if self.last - self.first > 1 else 1.0


@dataclass(frozen=True)
class Values:
    """The parameters of one tensor: of all models together, and of each model by its reference."""

    shared: Mapping[str, Any]
    by_model: Mapping[str, Mapping[str, Any]]


def check_file(file: MergekitFile) -> None:
    """Refuse what is not read, by name.

    Raises:
        RunError: with all of it.
    """
    faults = Faults()
    if file.merge_method not in PARAMETERS:
        faults.add(
            f"merge_method '{file.merge_method}' of mergekit is not read", where=KEY, fix=did_you_mean(file.merge_method, PARAMETERS)
        )
    if sum(part is not None for part in (file.models, file.slices, file.modules)) != 1:
        faults.add("one of `models` and `slices` is needed, and not both", fix="list every model under `models`")
    if file.modules is not None:
        faults.add(
            "`modules` are not read", where="modules", fix="list the models under `models`; models of one decoder have no other modules"
        )
    if file.tokenizer is not None and file.tokenizer_source is not None:
        faults.add("`tokenizer` and `tokenizer_source` exclude each other", where="tokenizer", fix="leave one of them out")
    for name in ("tokens", "pad_to_multiple_of"):
        if file.tokenizer is not None and getattr(file.tokenizer, name) is not None:
            faults.add(
                f"`tokenizer.{name}` is not read", where="tokenizer", fix="leave it out, and change the result's tokenizer afterwards"
            )
    if file.chat_template is not None:
        faults.add("`chat_template` is not read", where="chat_template", fix="leave it out: the result has the base's")
    for key, dtype in (("dtype", file.dtype), ("out_dtype", file.out_dtype)):
        if dtype is not None and dtype.removeprefix("torch.") not in ("float32", "bfloat16", "float16"):
            faults.add(f"`{key}: {dtype}` is not written", where=key, fix="give float32, bfloat16 or float16")
    for number, one in enumerate(file.slices or []):
        if one.residual_weight is not None:
            faults.add("`residual_weight` is not read", where=f"slices.{number}", fix="leave it out")
        if one.base_model not in (None, file.base_model):
            faults.add("a slice with a base model of its own is not read", where=f"slices.{number}.base_model", fix="give one `base_model`")
    for where, given in _all_settings(file):
        for name in given:
            known = PARAMETERS.get(file.merge_method)
            if known is not None and name not in known:
                fix = "leave it out: mergekit takes no notice of it either" if not known else did_you_mean(name, known)
                if (file.merge_method, name) in (("karcher", "max_iter"), ("karcher", "tol")):
                    fix = "leave it out: here the mean is iterated until it does not move"
                faults.add(f"`{file.merge_method}` has no parameter '{name}' that is read", where=where, fix=fix)
    faults.raise_any(RunError)


def _all_settings(file: MergekitFile) -> Iterable[tuple[str, Settings]]:
    yield "parameters", file.parameters
    for number, model in enumerate(file.models or []):
        yield f"models.{number}.parameters", model.parameters
    for number, one in enumerate(file.slices or []):
        yield f"slices.{number}.parameters", one.parameters
        for place, source in enumerate(one.sources):
            yield f"slices.{number}.sources.{place}.parameters", source.parameters


def slices_of(file: MergekitFile, blocks: int) -> list[LayerSlice]:
    """The file's slices from the bottom up; `models` are all slices of each, and the base is one of them.

    Raises:
        RunError: if slices leave out, repeat or reorder slices, or do not have the same models.
    """
    if file.models is not None:
        listed = [model.model for model in file.models]
        base = [InputModel(model=file.base_model)] if file.base_model is not None and file.base_model not in listed else []
        return [LayerSlice(0, blocks, [*file.models, *base])]
    faults, found, reached = Faults(), list[LayerSlice](), 0
    models = [source.model for source in (file.slices or [])[0].sources]
    for number, one in enumerate(file.slices or []):
        where, (first, last) = f"slices.{number}", one.sources[0].layer_range
        if any(source.layer_range != (first, last) for source in one.sources):
            faults.add(
                "the sources of a slice have different layers", where=where, fix="only slices of the same layers of every model are read"
            )
        if first != reached or last <= first:
            what = f"slices {first} to {last} do not follow layer {reached}: slices that leave out, repeat or reorder slices are not read"
            faults.add(what, where=where, fix="cover the slices once, in their order; passthrough merges are mergekit's own")
        if [source.model for source in one.sources] != models:
            faults.add("slices of different models are not read", where=where, fix="give all models in every slice, with `weight: 0`")
        found.append(LayerSlice(first, last, one.sources, one.parameters))
        reached = last
    if reached != blocks:
        faults.add(f"the slices end at layer {reached}; the base has {blocks}", where="slices", fix="cover every layer")
    faults.raise_any(RunError)
    return found


def values_of(file: MergekitFile, slices: Sequence[LayerSlice], tensor: str, layers: Layers) -> Values:
    """The parameters of a tensor. What lies outside the blocks has the first layers' before them, the last layers' after, at their start.

    Raises:
        RunError: if a required one is missing, or is no number.
    """
    layer = layers.of(tensor)
    if layer in (0, layers.last):
        part, t = (slices[0], 0.0) if layer == 0 else (slices[-1], 0.0)
    else:
        part = next(part for part in slices if part.first <= layer - 1 < part.last)
        t = part.share(layer - 1)
    outer, known = (part.parameters, file.parameters), PARAMETERS[file.merge_method]

    def value(name: str, scopes: Sequence[Settings], where: str) -> float | bool:
        for scope in scopes:
            if name in scope and (found := _evaluated(scope[name], known[name], tensor, t, where)) is not None:
                return found
        if (default := known[name].default) is None:
            raise RunError(f"'{name}' is missing for {where}", where=tensor, fix=f"give `{name}` under `parameters`")
        return default

    shared = {name: value(name, outer, name) for name, parameter in known.items() if not parameter.per_model}
    own = {name: parameter for name, parameter in known.items() if parameter.per_model}
    by_model = {
        source.model: {
            name: value(name, (source.parameters, *outer), f"{name} of {source.model}")
            for name, parameter in own.items()
            if source.model != file.base_model or parameter.of_base
        }
        for source in part.sources
    }
    return Values(shared, by_model)


def _evaluated(setting: Any, parameter: Parameter, tensor: str, t: float, where: str) -> float | bool | None:
    """A setting at one tensor: the first condition whose filter is in its name; a list of numbers at t of its length, on straight lines.

    None where no condition holds. A list of true and false is not interpolated.
    """
    if isinstance(setting, Conditional):
        setting = [setting]
    if not isinstance(setting, list):
        return parameter.read(setting, where)
    if not setting:
        return None
    if isinstance(setting[0], Conditional):
        fits = (one for one in setting if one.filter in (None, "*") or one.filter in tensor)
        return next((_evaluated(one.value, parameter, tensor, t, where) for one in fits), None)
    values = [parameter.read(one, where) for one in setting]
    if isinstance(parameter.default, bool):
        return values[int(t * (len(values) - 1))]
    from recall_merge.maths.weights import interpolated

    return interpolated([[one] for one in values], t)[0]
