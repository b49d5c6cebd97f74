"""NaN and infinity: found in whichever model holds them, all at once, and refused."""

from __future__ import annotations

from torch import Tensor

from recall_merge.files.experts import widen
from recall_merge.maths.deltas import dense
from recall_merge.merging.plan import Plan
from recall_merge.runtime.errors import CheckpointError, Faults


def is_finite(tensor: Tensor) -> bool:
    """Whether every number is finite. A finite sum proves it; where a sum overflows, each number is checked."""
    return not tensor.is_floating_point() or bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def refuse_nonfinite(plan: Plan) -> None:
    """Read all models again, and name every tensor that holds NaN or infinity.

    Raises:
        CheckpointError: if there is any.
    """
    faults = Faults()
    fix = "its training went wrong: take an earlier checkpoint, or `skip` the tensor to keep the base's"
    for name in filter(plan.merges, plan.specs):
        base = widen(plan.base.read(name))
        if not is_finite(base):
            faults.add(f"the base holds NaN or infinity in '{name}'", where=plan.base.folder, fix="no merge can mend the base")
            continue
        for expert in plan.experts:
            delta = expert.delta(name, base) if plan.vocabulary is None else expert.own(name, base)
            if delta is not None and not is_finite(dense(delta)):
                faults.add(f"expert '{expert.name}' holds NaN or infinity in '{name}'", where=expert.folder, fix=fix)
    faults.raise_any(CheckpointError)
