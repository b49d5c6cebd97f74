"""What no sound training or merge leaves, named and refused: NaN and infinity, deltas out of all proportion, a result that is the base."""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from recall_merge.files.adapter import Adapter
from recall_merge.files.experts import Expert, widen
from recall_merge.maths.deltas import Delta, dense, squared
from recall_merge.merging.plan import Plan
from recall_merge.runtime.errors import CheckpointError, Faults, ResultError

USUAL = 0.05
"""The least size that a base's tensor counts as, so that a tensor of zeros may be learnt, and a new one be drawn from N(0, 1)."""
KEEP = "name it under `skip:` if infinity is meant, as in a mask: that keeps the base's; else the base is damaged"
SHOWN = 3  # tensors per expert in an error


def is_finite(tensor: Tensor) -> bool:
    """Whether every number is finite. A finite sum proves it; where a sum overflows, each number is checked."""
    return not tensor.is_floating_point() or bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def keeps_numbers(stored: Tensor, kept: Tensor) -> bool:
    """Whether a tensor that is kept holds no NaN, and infinity only where it was before its dtype changed."""
    return is_finite(kept) or (not bool(kept.isnan().any()) and bool((kept.isinf() == stored.isinf()).all()))


def refuse_nonfinite(plan: Plan) -> None:
    """Read all models again. CheckpointError names every tensor that holds NaN or infinity, if there is any."""
    faults = Faults()
    fix = "its training went wrong: take an earlier checkpoint, or `skip` the tensor to keep the base's"
    for name in plan.specs:
        base = widen(plan.base.read(name))
        if not plan.merges(name) and not plan.aligns(name):
            if not keeps_numbers(base, base):
                faults.add(f"the base holds NaN in '{name}'", where=plan.base.folder, fix="the base is damaged: copy or download it again")
            continue
        if not is_finite(base):
            faults.add(f"the base holds NaN or infinity in '{name}'", where=plan.base.folder, fix=KEEP)
            continue
        for expert in plan.experts:
            delta = expert.delta(name, base) if plan.vocabulary is None else expert.own(name, base)
            if delta is None or is_finite(dense(delta)):
                continue
            if all(map(is_finite, _stored(expert, name))):
                what = f"expert '{expert.name}' changes '{name}' by more than float32 can hold, from finite numbers"
                faults.add(what, where=expert.folder, fix=fix)
            else:
                faults.add(f"expert '{expert.name}' holds NaN or infinity in '{name}'", where=expert.folder, fix=fix)
    faults.raise_any(CheckpointError)


def _stored(expert: Expert, name: str) -> list[Tensor]:
    """The numbers that an expert's files hold for a tensor."""
    if isinstance(expert.source, Adapter):
        edit = expert.source.edits.get(name)
        return [part.read() for part in edit.parts] if edit else []
    return [expert.source.read(name)]


class Difference:
    """Whether the result differs from the base in any number that experts may change: looked for until one is found."""

    def __init__(self) -> None:
        self.found = False

    def look(self, stored: Tensor, merged: Tensor) -> None:
        """Compare a tensor of the base with that of the result, in the dtype of the result; tensors may come from several threads."""
        self.found = self.found or merged.shape != stored.shape or not torch.equal(stored.to(merged.dtype), merged)


def refuse_base(plan: Plan) -> None:
    """ResultError: the result would be the base, whatever its experts have learnt."""
    names = ", ".join(f"'{expert.name}'" for expert in plan.experts)
    what = f"the result would be the base: no number of it differs, so nothing that {names} learnt is in it"
    fix = "check that the experts differ from the base; if they do, give `out.dtype: float32`, a larger `scale`, or fewer tensors to `skip`"
    raise ResultError(what, where=plan.target, fix=fix)


class DeltaSizes:
    """Root mean squares of base and deltas, tensor by tensor, from one sum over each span.

    An expert is compared with the base alone: whether it is refused does not depend on what it is merged with.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._limit = plan.run.change_limit
        self._spans: defaultdict[str, list[tuple[int, list[float]]]] = defaultdict(list)  # numbers, and sums of squares
        self._lock = threading.Lock()

    def add(self, name: str, base: Tensor, deltas: Sequence[Delta | None]) -> None:
        """Measure a tensor, or a span of one; spans may come from several threads."""
        if self._limit is not None and any(delta is not None for delta in deltas):
            squares = [0.0 if values is None else squared(values) for values in (base, *deltas)]
            with self._lock:
                self._spans[name].append((base.numel(), squares))

    def check(self) -> None:
        """Refuse experts that change a tensor out of all proportion, by the worst tensors of each, and numbers that are not finite."""
        excessive: dict[int, list[tuple[float, float, str]]] = defaultdict(list)  # by expert: size of the delta, of the base, tensor
        for name, spans in self._spans.items():
            count = max(1, sum(numbers for numbers, _ in spans))
            base, *deltas = (math.sqrt(math.fsum(column) / count) for column in zip(*(squares for _, squares in spans), strict=True))
            for expert, delta in enumerate(deltas):
                if not delta <= (self._limit or math.inf) * max(base, USUAL):  # subtle: true for NaN, too
                    excessive[expert].append((delta, base, name))
        if not excessive:
            return
        refuse_nonfinite(self._plan)
        faults = Faults()
        fix = "its training went wrong: take an earlier checkpoint, or `skip` the tensor to keep the base's"
        for number, tensors in sorted(excessive.items()):
            expert = self._plan.experts[number]
            more = f"; {len(tensors) - 1} more tensors likewise" if len(tensors) > 1 else ""
            for delta, base, name in sorted(tensors, key=lambda sizes: sizes[0] / max(sizes[1], USUAL), reverse=True)[:SHOWN]:
                what = f"expert '{expert.name}' changes '{name}' out of all proportion: by {delta:.4g}, where the base has {base:.4g}"
                faults.add(f"{what} (root mean squares{more})", where=expert.folder, fix=fix)
        faults.raise_any(CheckpointError)
