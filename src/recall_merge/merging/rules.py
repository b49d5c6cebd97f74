"""The rules of a merge, before any file is looked at: its method with the options checked, and where its weights come from."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, cast, get_type_hints

from pydantic import ConfigDict, create_model

from recall_merge.maths.layers import Layers
from recall_merge.merging.run import ByLayer, ByLoss, FromSamples, Losses, MergeRun, Part, Ramp, RecallWeights
from recall_merge.runtime.errors import Faults, RunError, did_you_mean
from recall_merge.runtime.sections import parse

if TYPE_CHECKING:
    from recall_merge.maths.methods import Method

OWN_WEIGHTS: dict[str, type[RecallWeights] | type[Losses]] = {"recall": RecallWeights, "lm_cocktail": Losses}
"""Methods that are ways to make weights: their options are those of their weights, and of the average that takes them."""

GivenWeights = tuple[float, ...] | tuple[tuple[float, ...], ...]
"""One number an expert, or a row of them for every layer; each row sums to 1."""


@dataclass(frozen=True)
class Rules:
    """A method with all its options, and its weights or how representations give them."""

    method: Method
    options: dict[str, Any]
    weights: GivenWeights | Points | FromSamples
    parts: tuple[PartRules, ...] = ()

    own: Mapping[str, Own] = field(default_factory=dict)

    def of_model(self, layers: Layers, names: Sequence[str]) -> Rules:
        """The rules for a base with these layers and tensors: a ramp has become a row for every layer, the parts what tensors have.

        Raises:
            RunError: if weights by layer are for more or fewer, or a part selects no tensor.
        """
        faults, weights, own = Faults(), self.weights, self.own
        with faults.collect():
            weights = weights if isinstance(weights, FromSamples) else _spread(weights, layers, "weights")
        with faults.collect():
            own = own_of_tensors(self.parts, names, layers)
        faults.raise_any(RunError)
        return replace(self, weights=weights, own=own)

    @property
    def resolved(self) -> GivenWeights | FromSamples:
        """The weights, once they are for a base."""
        assert not isinstance(self.weights, Points)
        return self.weights


@dataclass(frozen=True)
class Points:
    """Rows of numbers, one an expert, that are spread evenly over the blocks."""

    rows: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class PartRules:
    """What is different in some of the tensors: the part as the run has it, its weights, and what it changes of the method's options."""

    part: Part
    weights: GivenWeights | Points | None
    options: dict[str, Any]

    def fits(self, name: str, names: Collection[str], layers: Layers) -> bool:
        """Whether a tensor is one of the part's."""
        filters, kinds = _listed(self.part.filter), _listed(self.part.kind)
        return (
            (filters is None or any(_named(name, word, names) for word in filters))
            and (kinds is None or layers.kind_of(name) in kinds)
            and (self.part.layers is None or layers.of(name) in self.part.layers)
        )

    def weights_at(self, layers: Layers, where: str) -> GivenWeights | None:
        return None if self.weights is None else _spread(self.weights, layers, where)


@dataclass(frozen=True)
class Own:
    """What one tensor has of its own: weights instead of its layer's, options instead of the run's."""

    weights: tuple[float, ...] | None
    options: dict[str, Any]


def own_of_tensors(parts: Sequence[PartRules], names: Sequence[str], layers: Layers) -> dict[str, Own]:
    """What tensors have of their own, by their names.

    Of the parts that fit a tensor, the first that gives weights gives them, and so for each option.

    Raises:
        RunError: with every part that selects no tensor, or has weights for other layers.
    """
    faults, selected, known = Faults(), list[list[str]](), frozenset(names)
    found: dict[str, Own] = {}
    rows: list[GivenWeights | None] = []
    for number, part in enumerate(parts):
        selected.append([name for name in names if part.fits(name, known, layers)])
        rows.append(None)
        with faults.collect():
            rows[-1] = part.weights_at(layers, f"parts.{number}.weights")
        if not selected[-1]:
            told = part.part.model_dump(include={"filter", "kind", "layers"}, exclude_none=True)
            what = f"a part selects no tensor: {', '.join(f'{key} {value}' for key, value in told.items())}"
            faults.add(what, where=f"parts.{number}", fix=_near(part.part, names, layers))
    faults.raise_any(RunError)
    for number in reversed(range(len(parts))):  # so that the first one has the last word
        for name in selected[number]:
            before, row = found.get(name, Own(None, {})), rows[number]
            found[name] = Own(before.weights if row is None else _at(row, layers.of(name)), before.options | parts[number].options)
    return found


def _at(weights: GivenWeights, layer: int) -> tuple[float, ...]:
    """The row of a layer."""
    row = weights[layer] if isinstance(weights[0], tuple) else weights
    return cast("tuple[float, ...]", row)


def _near(part: Part, names: Sequence[str], layers: Layers) -> str:
    """What might have been meant by a part that selects nothing."""
    known = sorted({_unnumbered(name, layers) for name in names})
    if (filters := _listed(part.filter)) is not None and not any(_named(name, word, names) for word in filters for name in names):
        close = get_close_matches(filters[0].strip("*"), [word for name in known for word in (name, *name.split("."))], n=3, cutoff=0.5)
        return f"near it: {', '.join(dict.fromkeys(close))}" if close else f"the tensors are {', '.join(known)}"
    if (kinds := _listed(part.kind)) is not None and not {layers.kind_of(name) for name in names} & set(kinds):
        tied = "; the head is tied to the embedding" if "head" in kinds else ""
        return f"the kinds of its tensors are {', '.join(sorted({layers.kind_of(name) for name in names}))}{tied}"
    return f"the layers are 0 to {layers.last}; all of `filter`, `kind` and `layers` must fit"


def _named(name: str, word: str, names: Collection[str]) -> bool:
    """Whether a word of a filter names a tensor: a pattern, a tensor's whole name, which names no other, or a part of names."""
    return fnmatchcase(name, word) if "*" in word else name == word if word in names else word in name


def _unnumbered(name: str, layers: Layers) -> str:
    """A tensor's name with * for the number of its block."""
    return re.sub(rf"^({re.escape(layers.prefix)})\.\d+", r"\1.*", name)


def _listed(value: Any) -> list[str] | None:
    return value if value is None or isinstance(value, list) else [value]


def _spread(weights: GivenWeights | Points, layers: Layers, where: str) -> GivenWeights:
    """Given weights as a base of these layers has them: a ramp has a row for each."""
    from recall_merge.maths.weights import along_blocks, normalised

    if isinstance(weights, Points):
        return tuple(tuple(normalised(row)) for row in along_blocks(weights.rows, layers.blocks))
    if isinstance(weights[0], tuple) and len(weights) != layers.last + 1:
        what = f"there are weights for {len(weights)} layers; the base has {layers.last + 1}, from 0 to {layers.last}"
        raise RunError(what, where=f"{where}.by_layer", fix="0 is the embedding, the last one final norm and head")
    return weights


def choose_method(statistics: Sequence[bool], *, samples: bool, weights: bool) -> tuple[str, str]:
    """The method of a run that names none, and the reason.

    By what experts of five tasks showed (docs/results/all_methods.md, five_tasks_paired.md): merges by statistics keep nearly all of what the
    experts know, TSV keeps most of what can be kept without data, and plain averages, RECALL's among them, lose nearly half of it or more.

    Args:
        statistics: of each expert, whether it has one.
        samples: the run gives rows of the newest expert's data.
        weights: the run gives weights, or how they are made.

    >>> choose_method([True, True], samples=True, weights=False)[0], choose_method([True, False], samples=False, weights=False)[0]
    ('aligned', 'tsv')
    """
    if statistics and all(statistics):
        return "aligned", "every expert has input statistics"
    if weights:
        return "linear", "the run gives weights, and not every expert has input statistics"
    if len(statistics) > 1:
        return "tsv", "not every expert has input statistics, and of the methods that need none it did best"
    if samples:
        return "recall", "there are samples and one expert without input statistics"
    return "linear", "there is one expert, without input statistics"


def rules_of(run: MergeRun) -> Rules:
    """The method with its options, and where its weights come from.

    Raises:
        RunError: with every fault of them.
    """
    from recall_merge.maths.methods import METHODS

    if run.method not in METHODS:
        raise RunError(f"there is no method '{run.method}'", where="method", fix=did_you_mean(str(run.method), METHODS))
    method = METHODS[run.method]
    faults = Faults()
    fewest, most = method.experts
    if not fewest <= len(run.experts) <= (most or len(run.experts)):
        wanted = f"{fewest} or more" if most is None else f"{fewest}" if fewest == most else f"{fewest} to {most}"
        faults.add(
            f"method '{run.method}' merges {wanted} experts, the run lists {len(run.experts)}", where="experts", fix="choose another method"
        )
    options, weights = dict(run.options), run.weights
    names = [entry.name for entry in run.experts]
    found: GivenWeights | Points | FromSamples | None = None
    if schema := OWN_WEIGHTS.get(run.method):
        if weights != "uniform":
            faults.add(f"`method: {run.method}` has weights of its own", where="weights", fix="leave `weights` out, or use another method")
        with faults.collect():
            own = {key: options.pop(key) for key in list(options) if key in schema.model_fields}
            found = parse(schema, own, where="options")
    elif isinstance(weights, RecallWeights | ByLoss):
        found = weights if isinstance(weights, RecallWeights) else weights.by_loss
    else:
        with faults.collect():
            found = _numbers(weights, names, "weights")
    with faults.collect():
        options = _options(method, options, len(names))
    parts = []
    for number, part in enumerate(run.parts):
        with faults.collect():
            parts.append(_part(part, method, names, f"parts.{number}"))
    faults.raise_any(RunError)
    assert found is not None
    return Rules(method, options, found, tuple(parts))


def _part(part: Part, method: Method, experts: list[str], where: str) -> PartRules:
    own = [key for key in part.options if method.name in OWN_WEIGHTS and key in OWN_WEIGHTS[method.name].model_fields]
    if own:
        raise RunError(
            f"'{own[0]}' is of the whole model's weights, not of some tensors", where=f"{where}.options", fix="give it under `options`"
        )
    weights = None if part.weights is None else _numbers(part.weights, experts, f"{where}.weights")
    given = _options(method, part.options, len(experts), f"{where}.options")
    return PartRules(part, weights, {key: given[key] for key in part.options})


def _numbers(weights: str | list[float] | ByLayer | Ramp, experts: list[str], where: str) -> GivenWeights | Points:
    """Given weights, scaled to sum to 1, at each layer if they are by layer; those of a ramp when it is known how many layers there are."""
    if isinstance(weights, Ramp):
        rows = _by_name(weights.ramp, experts, f"{where}.ramp")
        if any(sum(row) == 0 for row in rows):
            raise RunError("all weights are 0 at a point of the ramp", where=f"{where}.ramp", fix="give at least one expert a weight there")
        return Points(tuple(map(tuple, rows)))
    if not isinstance(weights, ByLayer):
        numbers = weights if isinstance(weights, list) else [1.0] * len(experts)
        if len(numbers) != len(experts):
            what = f"there are {len(numbers)} weights for {len(experts)} experts"
            raise RunError(what, where=where, fix="give one number an expert")
        return _scaled(numbers, where)
    where, rows = f"{where}.by_layer", weights.by_layer
    if isinstance(rows, dict):
        rows = _by_name(rows, experts, where)
    wrong = [layer for layer, row in enumerate(rows) if len(row) != len(experts)]
    if wrong or not rows:
        what = (
            f"there are {len(rows[wrong[0]])} weights for {len(experts)} experts at layer {wrong[0]}" if wrong else "there are no weights"
        )
        raise RunError(what, where=where, fix="give one row a layer, and in it one number an expert")
    return tuple(_scaled(row, f"{where}.{layer}") for layer, row in enumerate(rows))


def _by_name(lists: dict[str, list[float]], experts: list[str], where: str) -> list[list[float]]:
    """One list an expert -> one row a layer, or point, with the experts in their order."""
    if set(lists) != set(experts) or len({len(numbers) for numbers in lists.values()}) != 1:
        what = f"there are lists of {', '.join(f'{len(numbers)} numbers for {name}' for name, numbers in lists.items())}"
        raise RunError(what, where=where, fix=f"give one list, all of one length, for each of {', '.join(experts)}")
    return [list(row) for row in zip(*(lists[name] for name in experts), strict=True)]


def _scaled(numbers: list[float], where: str) -> tuple[float, ...]:
    from recall_merge.maths.weights import normalised

    try:
        return tuple(normalised(numbers))
    except ValueError as error:
        raise RunError(str(error), where=where, fix="give numbers from 0 up, at least one of them above 0") from error


def _options(method: Method, given: dict[str, Any], experts: int, where: str = "options") -> dict[str, Any]:
    """Check options against the signature of the method's function."""
    hints = get_type_hints(method.function, include_extras=True)
    weight_options = list(OWN_WEIGHTS[method.name].model_fields) if method.name in OWN_WEIGHTS else []
    for key in given:
        if key not in method.options:
            known = [*method.options, *weight_options]
            fix = did_you_mean(key, known) if known else "it has no options"
            raise RunError(f"method '{method.name}' has no option '{key}'", where=where, fix=fix)
    fields: Any = {name: (hints[name], parameter.default) for name, parameter in method.options.items()}
    schema = create_model(method.name, __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields)
    found = parse(schema, given, where=where).model_dump()
    for key, value in found.items():
        if isinstance(value, list) and len(value) != experts:
            what = f"'{key}' has {len(value)} numbers for {experts} experts"
            raise RunError(what, where=where, fix="give one number, or one an expert")
    return found
