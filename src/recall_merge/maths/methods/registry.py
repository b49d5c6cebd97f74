"""The table of merge methods, and the decorator that adds a row to it."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import UnionType
from typing import Any, Literal, Protocol, TypeVar, Union, get_args, get_origin

import numpy as np
import torch
from annotated_types import Interval
from torch import Tensor


class MergeFunction(Protocol):
    """base (*s), deltas k of (*s), weights k numbers -> merged (*s); float32 or better throughout.

    delta_q = theta_q - theta_0 is what expert q changed in this tensor, weights[q] its weight at the tensor's layer.
    Keyword-only arguments are the method's options; `draws`, where a method names it, is its source of randomness, and `moments` what the
    experts' statistics say of this tensor's inputs.
    """

    def __call__(self, base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], **options: Any) -> Tensor: ...


FindThreshold = Callable[..., Any]
"""(k -> k-th largest size of a delta, n, dtype, expert, options) -> what the method needs to know of that delta as a whole."""


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    function: Callable[..., Tensor]
    source: str
    elementwise: bool = False
    """Every element is merged on its own, so a tensor may be merged in pieces."""
    sums: bool = False
    """It adds the deltas up: one that is zero may be left out."""
    find_threshold: FindThreshold | None = None
    """Every element is merged on its own once each delta has been looked at as a whole; the function takes what was found as `thresholds`."""
    experts: tuple[int, int | None] = (1, None)
    """Fewest and most experts that it merges; None = any number."""
    factors: bool = False
    """It takes deltas as `LowRank` factors where the expert has them; otherwise it is given dense deltas."""
    matrices: bool = False
    """It is made for the matrices of linear maps: give embedding tables to `linear` instead, as it does itself with other shapes."""
    ordered: bool = False
    """The order of the experts matters to it; the newest is the last."""
    options: dict[str, inspect.Parameter] = field(default_factory=dict, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return _row, (self.name,)  # in another process it is that one's own

    def in_spans(self, options: Mapping[str, Any]) -> bool:
        """Whether, with these options, a tensor may be merged span by span, if need be after a look. Sums over a tensor want it whole."""
        return self.elementwise or (self.find_threshold is not None and options["rescale"] == "none")

    @cached_property
    def random(self) -> bool:
        return "draws" in inspect.signature(self.function).parameters

    @cached_property
    def informed(self) -> bool:
        """It takes `moments`, one of each expert, for tensors that are linear maps: from the experts' statistics."""
        return "moments" in inspect.signature(self.function).parameters

    @property
    def doc(self) -> str:
        """Formula, convention and options, as `recall methods NAME` shows them."""
        text = inspect.getdoc(self.function) or ""
        if not self.options:
            return text
        return text + "\n\nOptions:\n" + "\n".join(f"    {explained(option)}" for option in self.options.values())


def explained(option: inspect.Parameter) -> str:
    """One line on an option, from its annotation: `Annotated[type, range, "what it means"]`.

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


METHODS: dict[str, Method] = {}


def _row(name: str) -> Method:
    import recall_merge.maths.methods  # whose modules fill the table

    return recall_merge.maths.methods.METHODS[name]


GIVEN = ("draws", "moments", "thresholds")  # what a method is given besides its options, where it names it

F = TypeVar("F", bound=Callable[..., Tensor])


def method(
    name: str,
    *,
    source: str,
    elementwise: bool = False,
    sums: bool = False,
    find_threshold: FindThreshold | None = None,
    experts: tuple[int, int | None] = (1, None),
    factors: bool = False,
    matrices: bool = False,
    ordered: bool = False,
) -> Callable[[F], F]:
    """Register a merge function under `name`. A name is taken once; a second use is refused, naming both places."""

    def register(function: F) -> F:
        if name in METHODS:
            first, second = (f"{f.__module__}.{f.__qualname__}" for f in (METHODS[name].function, function))
            raise ValueError(f"method '{name}' is registered twice: {first} and {second}")
        parameters = inspect.signature(function, eval_str=True).parameters.values()
        options = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in GIVEN}
        METHODS[name] = Method(name, function, source, elementwise, sums, find_threshold, experts, factors, matrices, ordered, options)
        return function

    return register


@dataclass(frozen=True)
class Draws:
    """Random numbers keyed by (seed, expert, tensor), so that order, shards and restarts cannot change them.

    >>> draws = Draws(seed=0, tensor="w", experts=("a", "b"))
    >>> bool((draws.uniform(0, (3,)) == draws.uniform(0, (3,))).all())
    True
    """

    seed: int
    tensor: str
    experts: tuple[str, ...]

    def uniform(self, expert: int, shape: Sequence[int]) -> Tensor:
        """Numbers in [0, 1), float32, one stream an expert; Philox keyed by SHA-256 of seed, expert name and tensor name."""
        return self.stream(expert)(shape)

    def stream(self, expert: int) -> Callable[[Sequence[int]], Tensor]:
        """The numbers of `uniform` piece by piece: every call of what is returned gives the next ones, in the shape it is asked for."""
        words = f"{self.seed}\0{self.experts[expert]}\0{self.tensor}".encode()
        key = int.from_bytes(hashlib.sha256(words).digest()[:16], "little")
        generator = np.random.Generator(np.random.Philox(key=key))
        return lambda shape: torch.from_numpy(generator.random(tuple(shape), dtype=np.float32))
