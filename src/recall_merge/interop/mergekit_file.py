"""The format of mergekit's run files (github.com/arcee-ai/mergekit): its keys, and the parameters that each tensor gets.

Filters, gradients and precedence are those of mergekit 0.1.5. Everything that is not supported is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from pydantic import ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from recall_merge.maths.layers import Layers
from recall_merge.maths.weights import interpolated
from recall_merge.merging.run import MAX_PATH
from recall_merge.runtime.errors import Faults, RunError, did_you_mean, short
from recall_merge.runtime.sections import Section

KEY = "merge_method"  # every run file of mergekit has it, and none of ours
Scalar = StrictBool | StrictInt | StrictFloat | StrictStr
Settings = Mapping[str, Any]
Name = Annotated[str, Field(min_length=1, max_length=MAX_PATH)]
Block = Annotated[int, Field(ge=0, le=1_000_000)]


class Conditional(Section):
    value: Scalar | list[Scalar]
    filter: str | None = None


Setting = Conditional | Scalar | list[Conditional] | list[Scalar]


class InputModel(Section):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: Name
    parameters: dict[str, Setting] = {}


class Source(InputModel):
    layer_range: tuple[Block, Block]


class Slice(Section):
    sources: list[Source] = Field(min_length=1)
    base_model: Name | None = None
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
    base_model: Name | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    parameters: dict[str, Setting] = {}


@dataclass(frozen=True)
class Parameter:
    """A parameter of one of mergekit's methods; without a default it is required."""

    default: float | bool | None = None
    per_model: bool = False
    of_base: bool = False
    """If the base is among the models, it has the parameter too."""

    def read(self, value: Any, where: str) -> float | bool:
        """A value as mergekit reads it: a number may be written as text."""
        if isinstance(self.default, bool):
            if isinstance(value, bool) or value in (0, 1):
                return bool(value)
            raise RunError(f"{short(value)} is neither true nor false", where=where, fix="give true or false")
        try:
            return float(value)
        except (ValueError, OverflowError):
            raise RunError(f"{short(value)} is not a number", where=where, fix="give a number") from None


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
"""The supported methods of mergekit, with their parameters and mergekit's defaults."""


class LayerSlice(NamedTuple):
    """Some blocks, from `first` up to but not including `end`: their models and parameters."""

    first: int
    end: int
    sources: Sequence[InputModel]
    parameters: Settings = {}

    def position(self, block: int) -> float:
        """Where a block lies on a gradient: 0 at the first, 1 at the last; a single block at 1."""
        return (block - self.first) / (self.end - self.first - 1) if self.end - self.first > 1 else 1.0


class Values(NamedTuple):
    """The parameters of one tensor: those shared by all models, and those of each model by its reference."""

    shared: Mapping[str, Any]
    by_model: Mapping[str, Mapping[str, Any]]


def check_file(file: MergekitFile) -> None:
    """Refuse what is not supported.

    Raises:
        RunError: with all of it, by name.
    """
    faults, method, slices = Faults(), file.merge_method, file.slices or []
    if method not in PARAMETERS:
        faults.add(f"mergekit's merge_method '{method}' is not supported", where=KEY, fix=did_you_mean(method, PARAMETERS))
    if sum(part is not None for part in (file.models, file.slices, file.modules)) != 1:
        faults.add("either `models` or `slices` is needed, and not both", fix="list every model under `models`")
    if file.tokenizer is not None and file.tokenizer_source is not None:
        faults.add("`tokenizer` and `tokenizer_source` exclude each other", where="tokenizer", fix="leave one of them out")
    tokenizer, change_later = file.tokenizer or Tokenizer(), "leave it out, and change the result's tokenizer afterwards"
    unsupported = [
        ("modules", "modules", file.modules, "list the models under `models`; models with a single decoder have no other modules"),
        ("tokenizer", "tokenizer.tokens", tokenizer.tokens, change_later),
        ("tokenizer", "tokenizer.pad_to_multiple_of", tokenizer.pad_to_multiple_of, change_later),
        (
            "chat_template",
            "chat_template",
            file.chat_template,
            "leave it out: the result has the base's, or a model's by `--set out.chat_template=NAME`",
        ),
        *((f"slices.{number}", "residual_weight", part.residual_weight, "leave it out") for number, part in enumerate(slices)),
    ]
    for where, key, value, fix in unsupported:
        if value is not None:
            faults.add(f"`{key}` is not supported", where=where, fix=fix)
    for key, dtype in (("dtype", file.dtype), ("out_dtype", file.out_dtype)):
        if dtype is not None and dtype.removeprefix("torch.") not in ("float32", "bfloat16", "float16"):
            faults.add(f"`{key}: {dtype}` is not supported", where=key, fix="give float32, bfloat16 or float16")
    for number, part in enumerate(slices):
        if part.base_model not in (None, file.base_model):
            where = f"slices.{number}.base_model"
            faults.add("a slice with its own base model is not supported", where=where, fix="give one `base_model`")
    supported = PARAMETERS.get(method, {})
    for where, settings in _all_settings(file) if method in PARAMETERS else ():
        for name in (name for name in settings if name not in supported):
            fix = did_you_mean(name, supported) if supported else "leave it out: mergekit ignores it too"
            if method == "karcher" and name in ("max_iter", "tol"):
                fix = "leave it out: here the mean is iterated until it no longer moves"
            faults.add(f"`{method}` has no supported parameter '{name}'", where=where, fix=fix)
    faults.raise_any(RunError)


def _all_settings(file: MergekitFile) -> Iterable[tuple[str, Settings]]:
    yield "parameters", file.parameters
    for number, model in enumerate(file.models or []):
        yield f"models.{number}.parameters", model.parameters
    for number, part in enumerate(file.slices or []):
        yield f"slices.{number}.parameters", part.parameters
        for place, source in enumerate(part.sources):
            yield f"slices.{number}.sources.{place}.parameters", source.parameters


def slices_of(file: MergekitFile, blocks: int) -> list[LayerSlice]:
    """The file's slices from the bottom up. `models` are one slice of all blocks, with the base among them.

    Raises:
        RunError: if slices leave out, repeat or reorder blocks, or have different models.
    """
    if file.models is not None:
        listed = [model.model for model in file.models]
        base = [InputModel(model=file.base_model)] if file.base_model is not None and file.base_model not in listed else []
        return [LayerSlice(0, blocks, [*file.models, *base])]
    faults, slices, reached = Faults(), list[LayerSlice](), 0
    models = [source.model for source in (file.slices or [])[0].sources]
    for number, part in enumerate(file.slices or []):
        where, (first, end) = f"slices.{number}", part.sources[0].layer_range
        if any(source.layer_range != (first, end) for source in part.sources):
            fix = "give every source of a slice the same `layer_range`"
            faults.add("the sources of a slice have different layers", where=where, fix=fix)
        if first != reached or end <= first:
            what = f"slice {first} to {end} does not continue at layer {reached}: layers cannot be left out, repeated or reordered"
            faults.add(what, where=where, fix="cover the layers once, in order; for passthrough merges use mergekit")
        if [source.model for source in part.sources] != models:
            faults.add(
                "slices with different models are not supported", where=where, fix="give all models in every slice, with `weight: 0`"
            )
        slices.append(LayerSlice(first, end, part.sources, part.parameters))
        reached = end
    if reached != blocks:
        faults.add(f"the slices end at layer {reached}; the base has {blocks}", where="slices", fix="cover every layer")
    faults.raise_any(RunError)
    return slices


def values_of(file: MergekitFile, slices: Sequence[LayerSlice], tensor: str, layers: Layers) -> Values:
    """The parameters of a tensor. Those before the blocks have the first slice's, those after them the last one's, at its start.

    Raises:
        RunError: if a required one is missing, or is not a number.
    """
    layer = layers.of(tensor)
    if layer in (0, layers.last):
        part, t = (slices[0], 0.0) if layer == 0 else (slices[-1], 0.0)
    else:
        part = next(part for part in slices if part.first <= layer - 1 < part.end)
        t = part.position(layer - 1)
    outer, parameters = (part.parameters, file.parameters), PARAMETERS[file.merge_method]

    def value(name: str, scopes: Sequence[Settings], where: str) -> float | bool:
        for scope in scopes:
            if name in scope and (setting := _evaluated(scope[name], parameters[name], tensor, t, where)) is not None:
                return setting
        if (default := parameters[name].default) is None:
            raise RunError(f"'{name}' is missing for {where}", where=tensor, fix=f"give `{name}` under `parameters`")
        return default

    shared = {name: value(name, outer, name) for name, parameter in parameters.items() if not parameter.per_model}
    own = {name: parameter for name, parameter in parameters.items() if parameter.per_model}
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
    """A setting for one tensor: the first condition whose filter is in its name; a list of numbers interpolated at t, from 0 to 1.

    None if no condition holds. A list of true and false is not interpolated.
    """
    if isinstance(setting, Conditional):
        setting = [setting]
    if not isinstance(setting, list):
        return parameter.read(setting, where)
    if not setting:
        return None
    if isinstance(setting[0], Conditional):
        fitting = (case for case in setting if case.filter in (None, "*") or case.filter in tensor)
        return next((_evaluated(case.value, parameter, tensor, t, where) for case in fitting), None)
    values = [parameter.read(number, where) for number in setting]
    if isinstance(parameter.default, bool):
        return values[int(t * (len(values) - 1))]
    return interpolated([[number] for number in values], t)[0]
