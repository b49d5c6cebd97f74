"""How the parameters are divided into units of work: spans of large tensors, and several small tensors together.

A thread holds one span of each model in float32, never a whole tensor, and a span fits the processor's cache. A method that first needs a
threshold of each whole delta (TIES and its kind) gets it by reading the delta span by span before the merge.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from recall_merge.files.experts import FullExpert, widen
from recall_merge.maths.order_statistics import kth_largest_size
from recall_merge.merging.plan import Plan

SPAN = 1 << 19
"""Numbers per span. A multiple of what a processor's vectors hold, so that spans are rounded as the whole tensor is."""
TWICE = 1 << 22
"""Numbers from which reading a delta twice, first for its threshold and then for the merge, is better than holding it whole."""


def needs_threshold(plan: Plan, name: str) -> bool:
    """Whether the method needs a threshold of each delta of a tensor before it can merge it span by span."""
    return plan.method.find_threshold is not None and plan.merges(name)


def in_spans(plan: Plan, name: str) -> bool:
    """Whether a tensor is merged span by span: it is large, and method and experts allow it."""
    if plan.specs[name].numel <= (TWICE if needs_threshold(plan, name) else SPAN):
        return False
    averaged = plan.method.matrices and name in plan.base.token_tensors  # it is no matrix, so `linear` merges it
    allowed = (averaged or plan.method.in_spans(plan.options_of(name))) and plan.run.prune is None and not plan.aligns(name)
    return (allowed or not plan.merges(name)) and all(expert.comes_in_pieces(name) for expert in plan.experts)


@dataclass(frozen=True)
class ThresholdSearch:
    """The search for one expert's threshold in one tensor. The spans of the tensor wait for its result."""

    name: str
    expert: int
    result: Future[Any] = field(default_factory=Future)

    def run(self, plan: Plan) -> None:
        try:
            self.result.set_result(self._find(plan))
        except BaseException as error:
            self.result.set_exception(error)

    def _find(self, plan: Plan) -> Any:
        """The threshold of the expert's whole delta, found by reading it span by span, a few times over."""
        name, expert = self.name, plan.experts[self.expert]
        size, dtype = plan.specs[name].numel, torch.promote_types(plan.base.tensors[name].spec.torch_dtype, torch.float32)
        assert plan.method.find_threshold is not None

        def read(span: range) -> Tensor:
            base = widen(plan.base.read(name, span))
            return expert.read_delta(name, base, span) if isinstance(expert, FullExpert) else base.new_zeros(base.shape)

        return plan.method.find_threshold(partial(kth_largest_size, read, size, span=SPAN), size, dtype, self.expert, plan.options_of(name))


@dataclass(frozen=True)
class Piece:
    """A tensor, or a span of it, with the searches that must end before it is merged."""

    name: str
    span: range | None = None
    searches: tuple[ThresholdSearch, ...] = ()

    @property
    def thresholds(self) -> list[Any] | None:
        """One threshold per expert; None where the method needs none."""
        return [search.result.result() for search in self.searches] or None


Unit = list[Piece]
"""Tensors, or a span of one, that one thread merges together."""


def units(plan: Plan, names: Iterable[str]) -> Iterator[Unit | ThresholdSearch]:
    """The work in the order of writing: large tensors span by span, small ones together, searches before the spans that need them."""
    unit: Unit = []
    numbers = 0
    for name in names:
        size = plan.specs[name].numel
        if unit and numbers + size > SPAN:
            yield unit
            unit, numbers = [], 0
        if in_spans(plan, name):
            searches = tuple(ThresholdSearch(name, q) for q in range(len(plan.experts)) if needs_threshold(plan, name))
            yield from searches
            for start in range(0, size, SPAN):
                yield [Piece(name, range(start, min(start + SPAN, size)), searches)]
        else:
            unit.append(Piece(name))
            numbers += size
    if unit:
        yield unit
