"""The table of merge methods, and the decorator that adds a function to it. A function's signature is the schema of its options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, wraps
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from annotated_types import Interval
from torch import Tensor

from recall_merge.maths.trimming import FindThreshold

Fraction = Annotated[float, Interval(gt=0, le=1)]
Scale = Annotated[float, "factor on the merged change, the papers' lambda or alpha"]
PROVIDED = ("draws", "moments", "thresholds")
"""What the merge provides to a method that names it: its source of randomness; the experts' input statistics for this tensor, or None
for an expert without; and what `find_threshold` found for each expert."""


@dataclass(frozen=True)
class Method:
    """A merge function and what callers need to know about it."""

    name: str
    function: Callable[..., Tensor]
    """base, k deltas theta_q - theta_0, k weights at the tensor's layer, *, options -> merged; of one shape, float32 or better."""
    source: str
    elementwise: bool = False
    """Every element is merged on its own, so a tensor may be merged in pieces."""
    sums: bool = False
    """It adds up the deltas: one that is zero may be left out."""
    find_threshold: FindThreshold | None = None
    """Every element is merged on its own once this threshold is known for each delta; the function takes them as `thresholds`."""
    experts: tuple[int, int | None] = (1, None)
    """Fewest and most experts that it merges; None = any number."""
    factors: bool = False
    """It takes deltas as `LowRank` factors where an expert has them; other methods get dense deltas."""
    matrices: bool = False
    """It is made for the matrices of linear maps: give embedding tables to `linear` instead, as it does itself with other shapes."""
    heavy: bool = False
    """Its work on one tensor takes longer than reading it: an accelerator that computes in float64 is worth the way there and back."""
    gradients: bool = False
    """It takes the `gradient` of every moment: statistics without are of no use to it."""
    ordered: bool = False
    """The order of the experts matters; the newest is the last."""
    options: dict[str, inspect.Parameter] = field(default_factory=dict, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return _method_named, (self.name,)  # another process has its own

    def in_spans(self, options: Mapping[str, Any]) -> bool:
        """Whether a tensor may be merged span by span with these options. Rescaling by the sum of a tensor needs it whole."""
        return self.elementwise or (self.find_threshold is not None and options["rescale"] == "none")

    @cached_property
    def random(self) -> bool:
        """It takes `draws`."""
        return "draws" in inspect.signature(self.function).parameters

    @cached_property
    def informed(self) -> bool:
        """It takes `moments`, one per expert, for tensors that are linear maps: from the experts' input statistics."""
        return "moments" in inspect.signature(self.function).parameters

    @property
    def doc(self) -> str:
        """Formula, convention and options, as `recall methods NAME` shows them."""
        return (inspect.getdoc(self.function) or "") + self.options_doc

    @property
    def options_doc(self) -> str:
        """One line per option."""
        return "".join(["\n\nOptions:", *(f"\n    {explained(option)}" for option in self.options.values())]) if self.options else ""


METHODS: dict[str, Method] = {}


def _method_named(name: str) -> Method:
    return METHODS[name]


def merge_present(base: Tensor, present: Tensor, weights: Sequence[float], merge: Callable[[Sequence[int], list[float]], Tensor]) -> Tensor:
    """Every row merged among the experts that have it, as if there were no others: no stand-in is neutral for every formula.

    present (k, n), bool;  base (n, *s);  `merge` takes the numbers of some experts and their weights, scaled to the sum of all, and gives
    the whole tensor merged among them, since a threshold or an angle may be that of a whole delta. A row that no expert of weight has is
    the base's.
    """
    merged = base.clone()
    for has in present.unique(dim=1).T:
        those = has.nonzero().flatten().tolist()
        if share := sum(weights[expert] for expert in those):
            scaled = [weights[expert] * sum(weights) / share for expert in those]
            rows = (present == has[:, None]).all(0)
            merged[rows] = merge(those, list(weights) if len(those) == len(weights) else scaled)[rows]
    return merged


F = TypeVar("F", bound=Callable[..., Tensor])


def method(name: str, *, source: str, **flags: Any) -> Callable[[F], F]:
    """Register a merge function under a name, with flags of `Method`. A name that is taken is refused, naming both functions."""

    def register(function: F) -> F:
        if name in METHODS:
            first, second = (f"{f.__module__}.{f.__qualname__}" for f in (METHODS[name].function, function))
            raise ValueError(f"method '{name}' is registered twice: {first} and {second}")
        parameters = inspect.signature(function, eval_str=True).parameters.values()
        options = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in PROVIDED}

        @wraps(function)
        def merged(base: Tensor, deltas: Sequence[Any], weights: Sequence[float], **given: Any) -> Tensor:
            return function(base, deltas, weights, **given) if base.numel() else base.clone()  # no formula needs to mind empty tensors

        METHODS[name] = Method(name, merged, source, options=options, **flags)
        return function

    return register


def explained(option: inspect.Parameter) -> str:
    """One line about an option, from its annotation: `Annotated[type, range, "what it means"]`.

    >>> from typing import Annotated
    >>> def f(*, density: Annotated[float, Interval(gt=0, le=1), "share that stays"] = 0.2): ...
    >>> explained(inspect.signature(f, eval_str=True).parameters["density"])
    'density = 0.2: share that stays; in (0, 1]'
    """
    extras = getattr(option.annotation, "__metadata__", ())
    meanings = [extra for extra in extras if isinstance(extra, str)][-1:]
    bare = option.annotation.__origin__ if extras else option.annotation
    of_one = getattr(get_args(bare)[0], "__metadata__", ()) if get_origin(bare) in (Union, UnionType) else ()
    ranges = [_range(extra) for extra in (*extras, *of_one) if isinstance(extra, Interval)]
    choices = ["one of " + ", ".join(map(str, get_args(bare)))] if get_origin(bare) is Literal else []
    return f"{option.name} = {option.default}: " + "; ".join(meanings + ranges + choices)


def _range(interval: Interval) -> str:
    low, high = (next((end for end in ends if end is not None), None) for ends in ((interval.ge, interval.gt), (interval.le, interval.lt)))
    if high is None:
        return f"{'at least' if interval.ge is not None else 'above'} {low}"
    return f"in {'[' if interval.ge is not None else '('}{low}, {high}{']' if interval.le is not None else ')'}"
