"""The table of merge methods, and the decorator that adds a row to it."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor


class MergeFunction(Protocol):
    """base (*s), deltas k of (*s), weights k numbers -> merged (*s); float32 or better throughout.

    delta_q = theta_q - theta_0 is what expert q changed in this tensor, weights[q] its weight at the tensor's depth.
    Keyword-only arguments are the method's options; `draws`, where a method names it, is its source of randomness.
    """

    def __call__(self, base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], **options: Any) -> Tensor: ...


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    function: Callable[..., Tensor]
    source: str
    elementwise: bool = False
    """Every element is merged on its own, so a tensor may be merged in pieces."""
    experts: tuple[int, int | None] = (1, None)
    """Fewest and most experts that it merges; None = any number."""
    factors: bool = False
    """It takes deltas as `LowRank` factors where the expert has them; otherwise it is given dense deltas."""
    options: dict[str, inspect.Parameter] = field(default_factory=dict, compare=False)

    @property
    def random(self) -> bool:
        return "draws" in inspect.signature(self.function).parameters

    @property
    def doc(self) -> str:
        return inspect.getdoc(self.function) or ""


METHODS: dict[str, Method] = {}

F = TypeVar("F", bound=Callable[..., Tensor])


def method(
    name: str, *, source: str, elementwise: bool = False, experts: tuple[int, int | None] = (1, None), factors: bool = False
) -> Callable[[F], F]:
    """Register a merge function under `name`. A name is taken once; a second use is refused, naming both places."""

    def register(function: F) -> F:
        if name in METHODS:
            first, second = (f"{f.__module__}.{f.__qualname__}" for f in (METHODS[name].function, function))
            raise ValueError(f"method '{name}' is registered twice: {first} and {second}")
        parameters = inspect.signature(function).parameters.values()
        options = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "draws"}
        METHODS[name] = Method(name, function, source, elementwise, experts, factors, options)
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
        words = f"{self.seed}\0{self.experts[expert]}\0{self.tensor}".encode()
        key = int.from_bytes(hashlib.sha256(words).digest()[:16], "little")
        return torch.from_numpy(np.random.Generator(np.random.Philox(key=key)).random(tuple(shape), dtype=np.float32))
