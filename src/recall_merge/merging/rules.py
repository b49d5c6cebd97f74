"""The rules of a run, before any file is read: method, options, and where weights come from; for the model, and for parts of it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from pydantic import ConfigDict, create_model

from recall_merge.maths.layers import Layers
from recall_merge.maths.methods import ALIASES, METHODS, Method
from recall_merge.maths.weights import along_blocks, normalised
from recall_merge.merging.run import ByLayer, FromHiddenStates, FromLosses, LossWeights, MergeRun, Part, Ramp, RecallWeights, SampleWeights
from recall_merge.runtime.errors import Faults, RunError, did_you_mean
from recall_merge.runtime.sections import parse

WEIGHT_OPTIONS: dict[str, type[RecallWeights] | type[LossWeights]] = {"recall": RecallWeights, "losses": LossWeights}
"""The options of weights from samples, by the key that asks for them."""


GivenWeights = tuple[float, ...] | tuple[tuple[float, ...], ...]
"""One number per expert, or one such row per layer; each row sums to 1."""


@dataclass(frozen=True)
class RampPoints:
    """Rows with one number per expert, to be spread evenly over the blocks."""

    rows: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class PartRules:
    """A part of the run with its weights, and the method's options that it changes."""

    part: Part
    weights: GivenWeights | RampPoints | None
    options: dict[str, Any]

    def fits(self, name: str, names: Collection[str], layers: Layers) -> bool:
        """Whether the part selects a tensor."""
        words, kinds = _listed(self.part.filter), _listed(self.part.kind)
        return (
            (words is None or any(_matches(name, word, names) for word in words))
            and (kinds is None or layers.kind_of(name) in kinds)
            and (self.part.layers is None or layers.of(name) in self.part.layers)
        )


@dataclass(frozen=True)
class Override:
    """Weights that one tensor has instead of its layer's, and options that it has instead of the run's."""

    weights: tuple[float, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a run asks for."""

    name: str
    """Of the method, or of the alias that the run gives."""
    source: str
    """Where it was published."""
    method: Method
    options: Mapping[str, Any]
    """All options of `method`, defaults included."""
    weights: GivenWeights | RampPoints | SampleWeights
    parts: tuple[PartRules, ...] = ()


def choose_method(has_statistics: Sequence[bool], *, samples: bool, weights: bool) -> tuple[str, str]:
    """The method of a run that names none, and the reason.

    The order follows what experts of five tasks showed (docs/results/all_methods.md, five_tasks_paired.md): merges by input statistics
    keep nearly all of what the experts know, TSV keeps most of what can be kept without data, and plain averages, RECALL's among them,
    lose nearly half of it or more.

    `has_statistics` has one entry per expert; `samples` and `weights` say whether the run gives them.

    >>> choose_method([True, True], samples=True, weights=False)[0], choose_method([True, False], samples=False, weights=False)[0]
    ('aligned', 'tsv')
    """
    if has_statistics and all(has_statistics):
        return "aligned", "every expert has input statistics"
    if weights:
        return "linear", "the run gives weights, and not every expert has input statistics"
    if len(has_statistics) > 1:
        why = "not every expert has input statistics, and it keeps most of what is known without"
        return "tsv", f"{why}; `recall compare` says which method does best on rows of yours"
    if samples:
        return "recall", "there are samples and one expert without input statistics"
    return "linear", "there is one expert, without input statistics"


def method_named(name: str) -> Method | None:
    """The method that a name or an alias stands for; None if there is no such name."""
    return METHODS.get(ALIASES[name].method if name in ALIASES else name)


def find_method(name: str, *, where: str = "method") -> Method:
    """The method that a name or an alias stands for. Raises RunError if there is no such name."""
    method = method_named(name)
    if method is None:
        raise RunError(f"there is no method '{name}'", where=where, fix=did_you_mean(name, {**METHODS, **ALIASES}))
    return method


def takes_gradients(name: str) -> bool:
    """Whether a method takes the gradients of input statistics; no unknown one does."""
    method = method_named(name)
    return method is not None and method.gradients


def make_rules(run: MergeRun) -> Rules:
    """The rules of a run, or RunError with every fault. An alias is expanded: into a method and a rule for weights."""
    name = str(run.method)
    method = find_method(name)
    faults, experts = Faults(), [entry.name for entry in run.experts]
    options, weights = dict(run.options), run.weights
    alias = ALIASES.get(name)
    weight_options = WEIGHT_OPTIONS[alias.weights].model_fields if alias else {}
    fewest, most = method.experts
    if not fewest <= len(experts) <= (most or len(experts)):
        number = f"{fewest} or more" if most is None else f"{fewest}" if fewest == most else f"{fewest} to {most}"
        what = f"method '{name}' merges {number} experts, the run lists {len(experts)}"
        faults.add(what, where="experts", fix="choose another method")
    if alias:
        if weights != "uniform":
            faults.add(f"`method: {name}` has weights of its own", where="weights", fix=f"give `method: {method.name}` with `weights`")
        given = {key: options.pop(key) for key in list(options) if key in weight_options}
        rule = faults.attempt(parse, WEIGHT_OPTIONS[alias.weights], given, where="options")
    elif isinstance(weights, FromHiddenStates):
        rule = weights.recall
    elif isinstance(weights, FromLosses):
        rule = weights.losses
    else:
        rule = faults.attempt(_given_weights, weights, experts, "weights")
    checked = faults.attempt(_check_options, method, options, len(experts), "options", name, list(weight_options))
    parts = [
        faults.attempt(_part_rules, part, method, experts, f"parts.{number}", list(weight_options)) for number, part in enumerate(run.parts)
    ]
    faults.raise_any(RunError)
    assert rule is not None and checked is not None
    source = alias.source if alias else method.source
    return Rules(name=name, source=source, method=method, options=checked, weights=rule, parts=tuple(filter(None, parts)))


def _part_rules(part: Part, method: Method, experts: list[str], where: str, weight_options: list[str]) -> PartRules:
    if whole := [key for key in part.options if key in weight_options]:
        what = f"'{whole[0]}' belongs to the weights of the whole model, not of some tensors"
        raise RunError(what, where=f"{where}.options", fix="give it under the run's own `options`")
    weights = None if part.weights is None else _given_weights(part.weights, experts, f"{where}.weights")
    checked = _check_options(method, part.options, len(experts), f"{where}.options")
    return PartRules(part, weights, {key: checked[key] for key in part.options})


def _given_weights(weights: str | list[float] | ByLayer | Ramp, experts: list[str], where: str) -> GivenWeights | RampPoints:
    """Given weights, scaled so that each row sums to 1. A ramp is spread later, when the number of layers is known."""
    if isinstance(weights, Ramp):
        rows = _rows_of_lists(weights.ramp, experts, f"{where}.ramp")
        if any(sum(row) == 0 for row in rows):
            raise RunError("all weights are 0 at a point of the ramp", where=f"{where}.ramp", fix="give at least one expert a weight there")
        return RampPoints(tuple(map(tuple, rows)))
    if isinstance(weights, ByLayer):
        where, rows = f"{where}.by_layer", weights.by_layer
        if isinstance(rows, dict):
            rows = _rows_of_lists(rows, experts, where)
        if not rows:
            raise RunError("there are no weights", where=where, fix="give one row per layer with one number per expert")
        if wrong := [(layer, row) for layer, row in enumerate(rows) if len(row) != len(experts)]:
            layer, row = wrong[0]
            what = f"there are {len(row)} weights for {len(experts)} experts at layer {layer}"
            raise RunError(what, where=where, fix="give one row per layer with one number per expert")
        return tuple(_scaled_to_one(row, f"{where}.{layer}") for layer, row in enumerate(rows))
    numbers = weights if isinstance(weights, list) else [1.0] * len(experts)
    if len(numbers) != len(experts):
        raise RunError(f"there are {len(numbers)} weights for {len(experts)} experts", where=where, fix="give one number per expert")
    return _scaled_to_one(numbers, where)


def _rows_of_lists(lists: dict[str, list[float]], experts: list[str], where: str) -> list[list[float]]:
    """One list per expert -> one row per layer (or point), experts in their order."""
    if set(lists) != set(experts) or len({len(numbers) for numbers in lists.values()}) != 1:
        what = f"there are lists of {', '.join(f'{len(numbers)} numbers for {name}' for name, numbers in lists.items())}"
        raise RunError(what, where=where, fix=f"give one list, all of one length, for each of {', '.join(experts)}")
    return [list(row) for row in zip(*(lists[name] for name in experts), strict=True)]


def _scaled_to_one(numbers: list[float], where: str) -> tuple[float, ...]:
    try:
        return tuple(normalised(numbers))
    except ValueError as error:
        raise RunError(str(error), where=where, fix="give numbers from 0 up, at least one of them above 0") from error


def _check_options(
    method: Method, given: Mapping[str, Any], experts: int, where: str, name: str | None = None, others: Sequence[str] = ()
) -> dict[str, Any]:
    """All options of a method, whose name in the run is `name`, checked against its signature; `others` belong to the run's weights."""
    for key in given:
        if key not in method.options:
            known = [*method.options, *others]
            fix = did_you_mean(key, known) if known else "it has no options"
            raise RunError(f"method '{name or method.name}' has no option '{key}'", where=where, fix=fix)
    fields: Any = {key: (parameter.annotation, parameter.default) for key, parameter in method.options.items()}
    schema = create_model(method.name, __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields)
    options = parse(schema, dict(given), where=where).model_dump()
    for key, value in options.items():
        if isinstance(value, list) and len(value) != experts:
            raise RunError(f"'{key}' has {len(value)} numbers for {experts} experts", where=where, fix="give one number, or one per expert")
    return options


def overrides_of_tensors(parts: Sequence[PartRules], names: Sequence[str], layers: Layers) -> dict[str, Override]:
    """The overrides of each tensor that a part selects, or RunError. Of several parts, the first that gives a setting counts."""
    faults, all_names = Faults(), frozenset(names)
    overrides: dict[str, Override] = {}
    for number, part in reversed([*enumerate(parts)]):  # so that the first part has the last word
        where = f"parts.{number}"
        weights: Any = None if part.weights is None else faults.attempt(weights_per_layer, part.weights, layers, f"{where}.weights")
        selected = [name for name in names if part.fits(name, all_names, layers)]
        for name in selected:
            before = overrides.get(name, Override())
            row = before.weights if weights is None else weights[layers.of(name)] if isinstance(weights[0], tuple) else weights
            overrides[name] = Override(row, {**before.options, **part.options})
        if not selected:
            selectors = part.part.model_dump(include={"filter", "kind", "layers"}, exclude_none=True)
            what = f"a part selects no tensor: {', '.join(f'{key} {value}' for key, value in selectors.items())}"
            faults.add(what, where=where, fix=_suggestion(part.part, names, layers))
    faults.raise_any(RunError)
    return overrides


def weights_per_layer(weights: GivenWeights | RampPoints, layers: Layers, where: str) -> GivenWeights:
    """Given weights for a base with these layers, neither more nor fewer; a ramp becomes one row per layer."""
    if isinstance(weights, RampPoints):
        return tuple(tuple(normalised(row)) for row in along_blocks(weights.rows, layers.blocks))
    if isinstance(weights[0], tuple) and len(weights) != layers.last + 1:
        what = f"there are weights for {len(weights)} layers; the base has {layers.last + 1}, from 0 to {layers.last}"
        raise RunError(what, where=f"{where}.by_layer", fix="0 is the embedding, the last one final norm and head")
    return weights


def _suggestion(part: Part, names: Sequence[str], layers: Layers) -> str:
    """What the author of a part that selects nothing may have meant."""
    patterns = sorted({re.sub(rf"^({re.escape(layers.prefix)})\.\d+", r"\1.*", name) for name in names})  # one per tensor of a block
    if (words := _listed(part.filter)) is not None and not any(_matches(name, word, names) for word in words for name in names):
        choices = [word for name in patterns for word in (name, *name.split("."))]
        close = get_close_matches(words[0].strip("*"), choices, n=3, cutoff=0.5)
        return f"near it: {', '.join(dict.fromkeys(close))}" if close else f"the tensors are {', '.join(patterns)}"
    kinds = {layers.kind_of(name) for name in names}
    if (wanted := _listed(part.kind)) is not None and not kinds & set(wanted):
        tied = "; the head is tied to the embedding" if "head" in wanted else ""
        return f"the kinds of its tensors are {', '.join(sorted(kinds))}{tied}"
    return f"the layers are 0 to {layers.last}; all of `filter`, `kind` and `layers` must fit"


def _matches(name: str, word: str, names: Collection[str]) -> bool:
    """Whether a word of a filter selects a tensor: as a pattern, as a whole name (which selects no other), or as a part of the name."""
    return fnmatchcase(name, word) if "*" in word else name == word if word in names else word in name


def _listed(value: Any) -> list[str] | None:
    return value if value is None or isinstance(value, list) else [value]
