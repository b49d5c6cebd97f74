"""The pass over the parameters: read every number of every model once, merge it, and hand it on in the order of the plan.

Where a method looks at one number at a time, the unit of work is a span of a few hundred thousand numbers, whatever tensor they are of: all
that is held of them fits the processor's cache, and the memory that a merge takes does not depend on the model. Where it wants to know
something of a delta as a whole first (which sizes are the largest), a look at the delta, span by span too, goes before. Other methods are
given whole tensors. Which it is makes no difference to the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any

from recall_merge.files.experts import Digest, FullExpert, widen
from recall_merge.files.output import WeightWriter
from recall_merge.merging.delta_size import DeltaSizes
from recall_merge.merging.nonfinite import is_finite, refuse_nonfinite
from recall_merge.merging.plan import SPAN, Plan
from recall_merge.merging.weights import MergeWeights
from recall_merge.runtime import memory
from recall_merge.runtime.errors import CheckpointError, ResultError
from recall_merge.runtime.parallel import in_order

if TYPE_CHECKING:
    from torch import Tensor

    from recall_merge.maths.deltas import Delta


def merge_tensors(
    plan: Plan, merge_weights: MergeWeights, digest: Digest, advance: Callable[[int], None] = lambda _: None
) -> Iterator[tuple[str, Tensor]]:
    """The result's tensors in the plan's order and dtypes; arithmetic in float32 or better.

    What an expert leaves alone is not touched: where no expert changes a tensor, the base's own numbers are the result, whatever the
    method (each promises that zero deltas give back the base).

    Args:
        digest: is told of every tensor of the base.
        advance: is told the bytes of each tensor when it is done.

    Raises:
        CheckpointError: if a model holds NaN or infinity, or an expert changes a tensor out of all proportion; all such are named.
        ResultError: if the merge overflows.
    """

    def one(name: str) -> tuple[str, Tensor]:
        return name, merge_tensor(plan, merge_weights, name, digest, sizes)

    with _explained(plan) as sizes:
        for name, merged in in_order(one, plan.specs, plan.threads):
            yield name, merged
            advance(plan.specs[name].nbytes)


def merge_tensors_into(
    writer: WeightWriter,
    plan: Plan,
    merge_weights: MergeWeights,
    digest: Digest,
    advance: Callable[[int], None],
    names: Iterable[str] | None = None,
) -> None:
    """Write what `merge_tensors` gives (of the tensors named, if any are), span by span where the method allows it. Arguments and errors are its."""
    memory.one_heap()
    digests = [digest, *(expert.digest for expert in plan.experts if isinstance(expert, FullExpert))]
    failures: list[BaseException] = []
    turn = Lock()

    def work(unit: Unit | ThresholdSearch) -> list[tuple[str, Tensor]]:
        if isinstance(unit, ThresholdSearch):
            unit.take(plan)
            return []
        try:  # small tensors are Python's work, which threads do in turns: to leave a turn in the middle makes it twice as long
            with turn if len(unit) > 1 else nullcontext():
                return [
                    (part.name, merge_tensor(plan, merge_weights, part.name, digest, sizes, part.span, part.thresholds)) for part in unit
                ]
        except BaseException as error:
            failures.append(error)
            for waited_for in digests:
                waited_for.stop()
            raise failures[0] from None  # the others stopped because of it

    with _explained(plan) as sizes:
        for unit in in_order(work, _units(plan, plan.specs if names is None else names), plan.threads):
            for name, merged in unit:
                writer.add_piece(name, merged)
            advance(sum(merged.nbytes for _, merged in unit))


@dataclass(frozen=True)
class ThresholdSearch:
    """What a method needs to know of one expert's delta before its spans can be merged. They wait for it."""

    name: str
    expert: int
    found: Future[Any] = field(default_factory=Future)

    def take(self, plan: Plan) -> None:
        try:
            self.found.set_result(_find_threshold(plan, self.name, self.expert))
        except BaseException as error:
            self.found.set_exception(error)


@dataclass(frozen=True)
class Part:
    """A tensor, or a span of it, with the looks that go before."""

    name: str
    span: range | None = None
    searches: tuple[ThresholdSearch, ...] = ()

    @property
    def thresholds(self) -> list[Any] | None:
        return [search.found.result() for search in self.searches] or None


Unit = list[Part]
"""Tensors, or a span of one, that are worked on together."""


def _units(plan: Plan, names: Iterable[str]) -> Iterator[Unit | ThresholdSearch]:
    """Tensors in the order of writing: the large ones in spans, if the method allows it, the small ones together."""
    unit: Unit = []
    held = 0
    for name in names:
        spec = plan.specs[name]
        if unit and held + spec.numel > SPAN:
            yield unit
            unit, held = [], 0
        if plan.in_spans(name):
            searches = tuple(ThresholdSearch(name, q) for q in range(len(plan.experts)) if plan.needs_thresholds(name))
            yield from searches
            for start in range(0, spec.numel, SPAN):
                yield [Part(name, range(start, min(start + SPAN, spec.numel)), searches)]
        else:
            unit.append(Part(name))
            held += spec.numel
    if unit:
        yield unit


def _find_threshold(plan: Plan, name: str, q: int) -> Any:
    """What the method finds when it looks at expert q's whole delta, by reading it span by span, a few times over."""
    import torch

    from recall_merge.maths.methods.order import kth_largest_size

    expert, spec = plan.experts[q], plan.base.tensors[name].spec
    dtype = torch.promote_types(spec.torch_dtype, torch.float32)
    assert plan.method.find_threshold is not None

    def read(span: range) -> Tensor:
        base = widen(plan.base.read(name, span))
        return expert.read_delta(name, base, span) if isinstance(expert, FullExpert) else base.new_zeros(base.shape)

    kth = partial(kth_largest_size, read, spec.numel, span=SPAN)
    return plan.method.find_threshold(kth, spec.numel, dtype, q, plan.options_of(name))


def merge_tensor(
    plan: Plan,
    merge_weights: MergeWeights,
    name: str,
    digest: Digest,
    sizes: DeltaSizes,
    span: range | None = None,
    thresholds: list[Any] | None = None,
) -> Tensor:
    """One tensor of the result; or of its numbers in their order those of a span, where method and experts allow it, with what a look at
    the deltas has found, where the method wants one."""
    stored = plan.base.read(name, span)
    if span:
        digest.add_piece(name, plan.base.tensors[name].spec, span.start, stored)
    else:
        digest.add(name, stored)
    spec = plan.specs[name]
    if not plan.merges(name) and not plan.aligns(name):
        return stored.to(spec.torch_dtype)
    weights = plan.weights_of(name, merge_weights)
    base, deltas = _deltas(plan, name, widen(stored), weights, span)
    sizes.add(name, base, deltas)
    merged = (
        base if all(delta is None for delta in deltas) else _scaled(plan, name, base, _merge(plan, name, base, deltas, weights, thresholds))
    )
    merged = merged.to(spec.torch_dtype)
    if not is_finite(merged):
        raise _NonFinite(name)
    return merged


@contextmanager
def _explained(plan: Plan) -> Iterator[DeltaSizes]:
    """Measure what is merged; say of numbers that are not finite, or too large, where they come from."""
    sizes = DeltaSizes(plan)
    try:
        yield sizes
    except _NonFinite as found:
        refuse_nonfinite(plan)
        sizes.check()
        raise ResultError(
            f"the merge overflows {plan.specs[found.tensor].dtype} in '{found.tensor}'", fix="lower `scale`, or give `out.dtype: float32`"
        ) from None
    sizes.check()


def _merge(plan: Plan, name: str, base: Tensor, deltas: list[Delta | None], weights: list[float], thresholds: list[Any] | None) -> Tensor:
    """Apply the method. Tables of tokens are no linear maps: methods that are made for those leave them to `linear`."""
    from recall_merge.maths.methods import METHODS, Draws

    method, given = plan.method, plan.options_of(name)
    if method.matrices and name in plan.base.token_tensors:
        method, given = METHODS["linear"], {key: value for key, value in given.items() if key == "scale"}
    if method.sums and plan.run.prune is None:  # pruning compares each with the mean of all
        weights = [weight for weight, delta in zip(weights, deltas, strict=True) if delta is not None]
        deltas = [delta for delta in deltas if delta is not None]
    ready = _pruned(plan, [_ready(delta, base, method.factors and plan.run.prune is None) for delta in deltas])
    if method.random:
        given["draws"] = Draws(plan.run.seed, name, tuple(expert.name for expert in plan.experts))
    if thresholds is not None:
        given["thresholds"] = thresholds
    if not method.informed:
        return method.function(base, ready, weights, **given)
    known = [None if stats is None else stats.moment(name) for stats in plan.statistics]
    moments = [None if found is None else found[0] for found in known]
    if any(found is not None and found[1] == 0 for found in known):  # stored as (i, o): the mathematics wants (o, i)
        turned = [_transposed(delta) for delta in ready]
        return method.function(base.mT.contiguous(), turned, weights, moments=moments, **given).mT.contiguous()
    return method.function(base, ready, weights, moments=moments, **given)


def _pruned(plan: Plan, deltas: list[Delta]) -> list[Delta]:
    """The deltas without what the run prunes of them; then they are dense."""
    from recall_merge.maths.deltas import dense
    from recall_merge.maths.methods.wrappers import prune_by_saliency

    if plan.run.prune is None:
        return deltas
    return list(prune_by_saliency([dense(delta) for delta in deltas], density=plan.run.prune.density, saliency=plan.run.prune.saliency))


def _scaled(plan: Plan, name: str, base: Tensor, merged: Tensor) -> Tensor:
    """What the merge adds to the base, times the scale of its layer where the run has one."""
    from recall_merge.maths.methods.wrappers import lines_scales

    if plan.run.scale_by_layer is None:
        return merged
    layers, scale = plan.base.layers, plan.run.scale_by_layer
    return base + lines_scales(layers.blocks, alpha=scale.alpha, beta=scale.beta)[layers.of(name)] * (merged - base)


def _transposed(delta: Delta) -> Delta:
    from recall_merge.maths.deltas import LowRank

    return LowRank(delta.down.mT, delta.up.mT) if isinstance(delta, LowRank) else delta.mT.contiguous()


def _deltas(plan: Plan, name: str, base: Tensor, weights: list[float], span: range | None) -> tuple[Tensor, list[Delta | None]]:
    """What each expert adds to the base, both in the rows of the result."""
    if plan.vocabulary is not None and plan.aligns(name):
        own = [expert.own(name, base) for expert in plan.experts]
        base = plan.vocabulary.align_base(base)
        return base, list(plan.vocabulary.align_deltas(base, own, weights))
    return base, [expert.delta(name, base, span) for expert in plan.experts]


def _ready(delta: Delta | None, base: Tensor, factors: bool) -> Delta:
    """A delta in the form that the method takes."""
    from recall_merge.maths.deltas import dense

    if delta is None:
        return base.new_zeros(base.shape)
    return delta if factors else dense(delta)


def conditions(plan: Plan, merge_weights: MergeWeights) -> dict[str, float]:
    """Of each tensor that the experts' statistics tell of, a bound of the condition number of the system that the merge solves."""
    from recall_merge.maths.methods.aligned import condition

    found: dict[str, float] = {}
    for name in plan.specs:
        known = [None if stats is None else stats.moment(name) for stats in plan.statistics]
        if any(known):
            moments = [None if one is None else one[0] for one in known]
            options = {key: value for key, value in plan.options_of(name).items() if key in ("keep", "ridge")}
            found[name] = condition(moments, plan.weights_of(name, merge_weights), **options)
    return found


class _NonFinite(CheckpointError):
    def __init__(self, tensor: str) -> None:
        super().__init__(f"'{tensor}' is not finite")
        self.tensor = tensor
