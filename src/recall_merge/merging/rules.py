"""The rules of a run, before any file is read: its method with all options checked, and where its weights come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ConfigDict, create_model

from recall_merge.maths.methods import ALIASES, METHODS, Method
from recall_merge.maths.weights import normalised
from recall_merge.merging.parts import GivenWeights, PartRules, RampPoints
from recall_merge.merging.run import ByLayer, FromHiddenStates, FromLosses, LossWeights, MergeRun, Part, Ramp, RecallWeights, SampleWeights
from recall_merge.runtime.errors import Faults, RunError, did_you_mean
from recall_merge.runtime.sections import parse

WEIGHT_OPTIONS: dict[str, type[RecallWeights] | type[LossWeights]] = {"recall": RecallWeights, "losses": LossWeights}
"""The options of weights from samples, by the key that asks for them."""


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

    Args:
        has_statistics: one entry per expert.
        samples: the run gives rows of the newest expert's data.
        weights: the run gives weights, or a rule for them.

    >>> choose_method([True, True], samples=True, weights=False)[0], choose_method([True, False], samples=False, weights=False)[0]
    ('aligned', 'tsv')
    """
    if has_statistics and all(has_statistics):
        return "aligned", "every expert has input statistics"
    if weights:
        return "linear", "the run gives weights, and not every expert has input statistics"
    if len(has_statistics) > 1:
        return "tsv", "not every expert has input statistics, and of the methods that need none it did best"
    if samples:
        return "recall", "there are samples and one expert without input statistics"
    return "linear", "there is one expert, without input statistics"


def method_named(name: str) -> Method | None:
    """The method that a name or an alias stands for; None if there is no such name."""
    return METHODS.get(ALIASES[name].method if name in ALIASES else name)


def make_rules(run: MergeRun) -> Rules:
    """The method with its options, and where its weights come from, or RunError with every fault.

    An alias is expanded here: into a method and a rule for weights.
    """
    name = str(run.method)
    method = method_named(name)
    if method is None:
        raise RunError(f"there is no method '{name}'", where="method", fix=did_you_mean(name, {**METHODS, **ALIASES}))
    faults, experts = Faults(), [entry.name for entry in run.experts]
    options, weights = dict(run.options), run.weights
    alias = ALIASES.get(name)
    weight_options = WEIGHT_OPTIONS[alias.weights].model_fields if alias else {}
    with faults.collect():
        _check_number_of_experts(name, method, len(experts))
    rule: GivenWeights | RampPoints | SampleWeights | None = None
    if alias:
        if weights != "uniform":
            faults.add(f"`method: {name}` has weights of its own", where="weights", fix=f"give `method: {method.name}` with `weights`")
        with faults.collect():
            given = {key: options.pop(key) for key in list(options) if key in weight_options}
            rule = parse(WEIGHT_OPTIONS[alias.weights], given, where="options")
    elif isinstance(weights, FromHiddenStates):
        rule = weights.recall
    elif isinstance(weights, FromLosses):
        rule = weights.losses
    else:
        with faults.collect():
            rule = _given_weights(weights, experts, "weights")
    with faults.collect():
        options = _check_options(method, options, len(experts), "options", name, list(weight_options))
    parts: list[PartRules] = []
    for number, part in enumerate(run.parts):
        with faults.collect():
            parts.append(_part_rules(part, method, experts, f"parts.{number}", list(weight_options)))
    faults.raise_any(RunError)
    assert rule is not None
    source = alias.source if alias else method.source
    return Rules(name=name, source=source, method=method, options=options, weights=rule, parts=tuple(parts))


def _check_number_of_experts(name: str, method: Method, experts: int) -> None:
    fewest, most = method.experts
    if not fewest <= experts <= (most or experts):
        number = f"{fewest} or more" if most is None else f"{fewest}" if fewest == most else f"{fewest} to {most}"
        what = f"method '{name}' merges {number} experts, the run lists {experts}"
        raise RunError(what, where="experts", fix="choose another method")


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
