"""The pass over the parameters: read every number of every model once, merge it, and write it in the order of the plan.

Arithmetic runs in float32 or better, in the order of the experts, and is rounded once. The bytes of the result depend neither on the
number of threads nor on how tensors are divided into spans.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor

from recall_merge.files.experts import FullExpert, widen
from recall_merge.files.hashing import ModelDigest
from recall_merge.maths.deltas import Delta, LowRank, dense
from recall_merge.maths.methods import METHODS, Draws, Method
from recall_merge.maths.methods.informed import condition
from recall_merge.maths.methods.registry import merge_present
from recall_merge.maths.trimming import prune_by_saliency
from recall_merge.maths.weights import lines_scales
from recall_merge.merging.placement import takes
from recall_merge.merging.plan import Plan
from recall_merge.merging.spans import Piece, ThresholdSearch, Unit, units
from recall_merge.merging.unsound import DeltaSizes, Difference, is_finite, keeps_numbers, refuse_nonfinite
from recall_merge.merging.weights import MergeWeights
from recall_merge.runtime import memory
from recall_merge.runtime.device import is_full
from recall_merge.runtime.errors import CheckpointError, ResultError
from recall_merge.runtime.parallel import in_order

ON_DEVICE = Lock()  # of the thread whose tensor is in an accelerator's memory


class Writer(Protocol):
    """Takes the numbers of the result in the order of the plan."""

    def add_piece(self, name: str, piece: Tensor) -> None: ...


class TensorCollector:
    """A writer that keeps the result in memory, in `tensors`."""

    def __init__(self, plan: Plan) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._specs = plan.specs
        self._pieces: list[Tensor] = []

    def add_piece(self, name: str, piece: Tensor) -> None:
        self._pieces.append(piece.reshape(-1))
        spec = self._specs[name]
        if sum(each.numel() for each in self._pieces) == spec.numel:
            whole = self._pieces[0] if len(self._pieces) == 1 else torch.cat(self._pieces)
            self.tensors[name], self._pieces = whole.view(spec.shape), []


def merge_tensors(
    plan: Plan,
    weights: MergeWeights,
    names: Iterable[str],
    writer: Writer,
    digest: ModelDigest,
    advance: Callable[[int], None] = lambda _: None,
) -> bool:
    """Merge the tensors named and hand them to the writer, in the plan's order and dtypes. `advance` takes the bytes that were written.

    A tensor that no expert changes keeps the base's own numbers, whatever the method: each method promises as much of zero deltas. `digest`
    takes in every tensor of the base, as the full experts' own digests take in theirs. CheckpointError names all NaN, infinity and changes
    out of all proportion; ResultError says that the merge overflows.    -> whether any number differs from the base's
    """
    memory.one_heap()
    digests = digests_of(plan, digest)
    failures: list[BaseException] = []
    turn, difference = Lock(), Difference()

    def work(unit: Unit | ThresholdSearch) -> list[tuple[str, Tensor]]:
        if isinstance(unit, ThresholdSearch):
            unit.run(plan)
            return []
        try:  # small tensors are Python's work, which threads can only do in turns: switching inside a turn makes it twice as long
            with turn if len(unit) > 1 else nullcontext():
                return [(piece.name, _merge_piece(plan, weights, piece, digest, sizes, difference)) for piece in unit]
        except BaseException as error:
            failures.append(error)
            for waiting in digests:
                waiting.stop()
            raise failures[0] from None  # the other threads stopped because of the first one

    with _explained(plan) as sizes:
        for unit in in_order(work, units(plan, names), plan.threads):
            for name, merged in unit:
                writer.add_piece(name, merged)
            advance(sum(merged.nbytes for _, merged in unit))
    return difference.found


def digests_of(plan: Plan, base: ModelDigest) -> list[ModelDigest]:
    """The digests that a pass feeds: the base's, then those of the full experts."""
    return [base, *(expert.digest for expert in plan.experts if isinstance(expert, FullExpert))]


def weights_of(plan: Plan, weights: MergeWeights, name: str) -> list[float]:
    """The experts' weights for one tensor: its own, or those of its layer."""
    override = plan.overrides.get(name)
    if override is not None and override.weights is not None:
        return list(override.weights)
    return weights.of_experts(plan.base.layers.of(name))


def condition_numbers(plan: Plan, weights: MergeWeights) -> dict[str, float]:
    """A bound of the condition number of the systems that the merge solves, for each tensor with input statistics."""
    numbers: dict[str, float] = {}
    for name, spec in plan.specs.items():
        options = {key: value for key, value in plan.options_of(name).items() if key in ("offdiagonal", "ridge")}
        for matrix in range(spec.shape[0]) if len(spec.shape) == 3 else (None,):
            moments = [moment and moment[0] for moment in _moments(plan, name, matrix)]
            if any(moment is not None for moment in moments):
                bound = condition(moments, weights_of(plan, weights, name), **options)
                numbers[name] = max(bound, numbers.get(name, bound))
    return numbers


def _merge_piece(plan: Plan, weights: MergeWeights, piece: Piece, digest: ModelDigest, sizes: DeltaSizes, difference: Difference) -> Tensor:
    """One tensor of the result, or a span of one."""
    name, span = piece.name, piece.span
    stored = plan.base.read(name, span)
    if span:
        digest.add_piece(name, plan.base.tensors[name].spec, span.start, stored)
    else:
        digest.add(name, stored)
    dtype = plan.specs[name].torch_dtype
    if not plan.merges(name) and not plan.aligns(name):
        kept = stored.to(dtype)
        if not keeps_numbers(stored, kept):
            raise _NonFinite(name)
        return kept
    tensor_weights = weights_of(plan, weights, name)
    base = widen(stored)
    if plan.vocabulary is not None and plan.aligns(name):  # both in the rows of the result
        own = [expert.own(name, base) for expert in plan.experts]
        base = plan.vocabulary.align_base(base)
        deltas = list(plan.vocabulary.align_deltas(base, own))
    else:
        deltas = [expert.delta(name, base, span) for expert in plan.experts]
    sizes.add(name, base, deltas)
    merged = base
    if any(delta is not None for delta in deltas):
        merge = partial(_apply_method, plan, name, base, deltas, piece.thresholds)
        if plan.vocabulary is not None and plan.aligns(name) and not plan.vocabulary.present.all():
            merged = merge_present(base, plan.vocabulary.present, tensor_weights, merge)
        else:
            merged = merge(range(len(deltas)), tensor_weights)
        if (scale := plan.run.scale_by_layer) is not None:
            scales = lines_scales(plan.base.layers.blocks, alpha=scale.alpha, beta=scale.beta)
            merged = base + scales[plan.base.layers.of(name)] * (merged - base)
        if (zero := merged == 0).any():  # -0.0 + 0.0 is 0.0: a zero that is left as it is keeps its sign
            merged = torch.where(zero & (base == 0), base, merged)
    merged = merged.to(dtype)
    if not is_finite(merged):
        raise _NonFinite(name)
    if any(delta is not None for delta in deltas):
        difference.look(stored, merged)
    return merged


def _apply_method(
    plan: Plan,
    name: str,
    base: Tensor,
    all_deltas: Sequence[Delta | None],
    thresholds: list[Any] | None,
    those: Sequence[int],
    weights: list[float],
) -> Tensor:
    """Call the method with what it needs, for those experts. Token tensors are no linear maps: methods for matrices leave them to `linear`.

    So do methods of several experts where fewer have a row.
    """
    method, options, prune = plan.method, plan.options_of(name), plan.run.prune
    deltas = [all_deltas[expert] for expert in those]
    if (method.matrices and name in plan.base.token_tensors) or len(those) < method.experts[0]:
        method, options = METHODS["linear"], {key: value for key, value in options.items() if key == "scale"}
    options = {key: [value[expert] for expert in those] if isinstance(value, list) else value for key, value in options.items()}
    if method.sums and prune is None:  # pruning compares each delta with the mean of all
        weights = [weight for weight, delta in zip(weights, deltas, strict=True) if delta is not None]
        deltas = [delta for delta in deltas if delta is not None]
    ready = [base.new_zeros(base.shape) if delta is None else delta for delta in deltas]
    if prune is not None or not method.factors:
        ready = [dense(delta) for delta in ready]
    if prune is not None:
        ready = list(prune_by_saliency([dense(delta) for delta in ready], density=prune.density, saliency=prune.saliency))
    if method.random:
        options["draws"] = Draws(plan.run.seed, name, tuple(plan.experts[expert].name for expert in those))
    if thresholds is not None:
        options["thresholds"] = thresholds
    if not method.informed:
        return _call(plan, method, base, ready, weights, options)
    if base.ndim == 3 and any(_moments(plan, name, 0)):  # the matrices of a mixture's experts, each with inputs of its own
        whole = [dense(delta) for delta in ready]
        matrices = (_informed(plan, name, n, base[n], [delta[n] for delta in whole], weights, options) for n in range(len(base)))
        return torch.stack(list(matrices))
    return _informed(plan, name, None, base, ready, weights, options)


def _informed(
    plan: Plan, name: str, expert: int | None, base: Tensor, deltas: Sequence[Delta], weights: list[float], options: dict[str, Any]
) -> Tensor:
    """What a method gives that takes the moments of a tensor's inputs, or of those of a mixture's expert."""
    moments = _moments(plan, name, expert)
    options = {**options, "moments": [moment and moment[0] for moment in moments]}
    if any(moment is not None and moment[1] == 0 for moment in moments):  # stored as (i, o): the mathematics wants (o, i)
        turned = [LowRank(delta.down.mT, delta.up.mT) if isinstance(delta, LowRank) else delta.mT.contiguous() for delta in deltas]
        return _call(plan, plan.method, base.mT.contiguous(), turned, weights, options).mT.contiguous()
    return _call(plan, plan.method, base, deltas, weights, options)


def _call(plan: Plan, method: Method, base: Tensor, deltas: Sequence[Delta], weights: list[float], options: dict[str, Any]) -> Tensor:
    """What the method gives: from the plan's device, if its work is worth the way there, where one tensor is at a time; else from here."""
    device = plan.device
    if not takes(device, method) or (method.matrices and base.ndim != 2):
        return method.function(base, deltas, weights, **options)
    try:
        with ON_DEVICE:
            moments = {"moments": [each and each.to(device) for each in options["moments"]]} if method.informed else {}
            there = [delta.to(device) for delta in deltas]
            return method.function(base.to(device), there, weights, **options | moments).cpu()
    except RuntimeError as error:
        if not is_full(error):
            raise
    plan.note(f"{device} has too little memory for `{method.name}` of the largest tensors: the processor merged them")
    return method.function(base, deltas, weights, **options)


def _moments(plan: Plan, name: str, expert: int | None) -> list[Any]:
    """Per expert, the second moment of a tensor's inputs and the axis along which they run; None where it has no statistics of it."""
    return [None if stats is None else stats.moment(name, expert) for stats in plan.statistics]


@contextmanager
def _explained(plan: Plan) -> Iterator[DeltaSizes]:
    """Measure the deltas, and name the models that cause numbers that are not finite or out of all proportion."""
    sizes = DeltaSizes(plan)
    try:
        yield sizes
    except _NonFinite as error:
        refuse_nonfinite(plan)
        sizes.check()
        who, fix = ("the merge", "lower `scale`, or ") if plan.merges(error.tensor) else ("the base", "")
        what = f"{who} overflows {plan.specs[error.tensor].dtype} in '{error.tensor}'"
        raise ResultError(what, fix=f"{fix}give `out.dtype: float32`") from None
    sizes.check()


class _NonFinite(CheckpointError):
    def __init__(self, tensor: str) -> None:
        super().__init__(f"'{tensor}' is not finite")
        self.tensor = tensor
