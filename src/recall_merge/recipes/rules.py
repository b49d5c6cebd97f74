"""The rules of a merge, before any file is looked at: its method with the options checked, and where its weights come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import ConfigDict, create_model

from recall_merge.config import ByDepth, MergeRun, Representations, parse
from recall_merge.errors import Faults, RunError, did_you_mean
from recall_merge.maths.depths import Depths

if TYPE_CHECKING:
    from recall_merge.maths.methods import Method

GivenWeights = tuple[float, ...] | tuple[tuple[float, ...], ...]
"""One number an expert, or a row of them for every depth; each row sums to 1."""


@dataclass(frozen=True)
class Rules:
    """A method with all its options, and its weights or how representations give them."""

    method: Method
    options: dict[str, Any]
    weights: GivenWeights | Representations

    def check_depths(self, depths: Depths) -> None:
        """Check that weights by depth are for the base's depths.

        Raises:
            RunError: if there are more or fewer.
        """
        if isinstance(self.weights, tuple) and isinstance(self.weights[0], tuple) and len(self.weights) != depths.last + 1:
            what = f"there are weights for {len(self.weights)} depths; the base has {depths.last + 1}, from 0 to {depths.last}"
            raise RunError(what, where="weights.by_depth", fix="0 is the embedding, the last one final norm and head")


def choose_method(cards: Sequence[bool], *, samples: bool, weights: bool) -> tuple[str, str]:
    """The method of a run that names none, and the reason.

    Provisional: `aligned` did best of all methods, on what was learnt and elsewhere, in the first trials with five tasks and small
    adapters; the rest is by what is at hand, and no measurement stands behind it yet.

    Args:
        cards: of each expert, whether it has one.
        samples: the run gives rows of the newest expert's data.
        weights: the run gives weights, or how they are made.

    >>> choose_method([True, True], samples=True, weights=False)[0], choose_method([True, False], samples=False, weights=False)[0]
    ('aligned', 'linear')
    """
    if cards and all(cards):
        return "aligned", "every expert has a card"
    if weights:
        return "linear", "the run gives weights, and not every expert has a card"
    if samples:
        return "recall", "the run gives samples, and not every expert has a card"
    return "linear", "the run gives no samples, and not every expert has a card"


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
    found: GivenWeights | Representations | None = None
    if run.method == "recall":
        if weights != "uniform":
            faults.add("`method: recall` has weights of its own", where="weights", fix="leave `weights` out, or use another method")
        with faults.collect():
            own = {key: options.pop(key) for key in list(options) if key in Representations.model_fields}
            found = parse(Representations, own, where="options")
    else:
        with faults.collect():
            found = weights if isinstance(weights, Representations) else _numbers(weights, [entry.name for entry in run.experts])
    with faults.collect():
        options = _options(method, options)
    faults.raise_any(RunError)
    assert found is not None
    return Rules(method, options, found)


def _numbers(weights: str | list[float] | ByDepth, experts: list[str]) -> GivenWeights:
    """Given weights, scaled to sum to 1, at each depth if they are by depth."""
    if not isinstance(weights, ByDepth):
        numbers = weights if isinstance(weights, list) else [1.0] * len(experts)
        if len(numbers) != len(experts):
            what = f"there are {len(numbers)} weights for {len(experts)} experts"
            raise RunError(what, where="weights", fix="give one number an expert")
        return _scaled(numbers, "weights")
    where, rows = "weights.by_depth", weights.by_depth
    if isinstance(rows, dict):
        if set(rows) != set(experts) or len({len(numbers) for numbers in rows.values()}) != 1:
            what = f"there are lists of {', '.join(f'{len(numbers)} numbers for {name}' for name, numbers in rows.items())}"
            raise RunError(what, where=where, fix=f"give one list, all of one length, for each of {', '.join(experts)}")
        rows = [list(row) for row in zip(*(rows[name] for name in experts), strict=True)]
    wrong = [depth for depth, row in enumerate(rows) if len(row) != len(experts)]
    if wrong or not rows:
        what = (
            f"there are {len(rows[wrong[0]])} weights for {len(experts)} experts at depth {wrong[0]}" if wrong else "there are no weights"
        )
        raise RunError(what, where=where, fix="give one row a depth, and in it one number an expert")
    return tuple(_scaled(row, f"{where}.{depth}") for depth, row in enumerate(rows))


def _scaled(numbers: list[float], where: str) -> tuple[float, ...]:
    from recall_merge.maths.weights import normalised

    try:
        return tuple(normalised(numbers))
    except ValueError as error:
        raise RunError(str(error), where=where) from error


def _options(method: Method, given: dict[str, Any]) -> dict[str, Any]:
    """Check options against the signature of the method's function."""
    hints = get_type_hints(method.function, include_extras=True)
    weight_options = list(Representations.model_fields) if method.name == "recall" else []
    for key in given:
        if key not in method.options:
            known = [*method.options, *weight_options]
            fix = did_you_mean(key, known) if known else "it has no options"
            raise RunError(f"method '{method.name}' has no option '{key}'", where="options", fix=fix)
    fields: Any = {name: (hints[name], parameter.default) for name, parameter in method.options.items()}
    schema = create_model(method.name, __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields)
    return parse(schema, given, where="options").model_dump()
