"""Changes out of all proportion: finite numbers that no sound training leaves, found while the deltas come by, and refused."""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from recall_merge.merging.nonfinite import refuse_nonfinite
from recall_merge.merging.plan import Plan
from recall_merge.runtime.errors import CheckpointError, Faults

if TYPE_CHECKING:
    from torch import Tensor

    from recall_merge.maths.deltas import Delta

USUAL = 0.05
"""What a base's numbers count as where they are smaller, so that a tensor of zeros may be learnt, and a fresh one be drawn from N(0, 1)."""


class DeltaSizes:
    """How large the numbers of base and deltas are, tensor by tensor: root mean squares, from one sum over each span of each.

    An expert is held against the base alone. Others that change a tensor as much would not make it sound, and whether it is refused shall
    not depend on what it is merged with.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._limit = plan.run.change_limit
        self._spans: defaultdict[str, list[tuple[int, list[float]]]] = defaultdict(list)
        self._lock = threading.Lock()

    def add(self, name: str, base: Tensor, deltas: Sequence[Delta | None]) -> None:
        """Measure a tensor, or a span of one; spans may come from several threads."""
        from recall_merge.maths.deltas import squared

        if self._limit is not None and any(delta is not None for delta in deltas):
            squares = [0.0 if one is None else squared(one) for one in (base, *deltas)]
            with self._lock:
                self._spans[name].append((base.numel(), squares))

    def check(self) -> None:
        """Refuse the experts that change a tensor out of all proportion, naming for each the three worst.

        Raises:
            CheckpointError: with all of them; or if a number is not finite that did not reach the result.
        """
        found: dict[int, list[tuple[float, float, str]]] = defaultdict(list)
        for name, spans in self._spans.items():
            count = max(1, sum(numbers for numbers, _ in spans))
            base, *changes = (math.sqrt(math.fsum(column) / count) for column in zip(*(squares for _, squares in spans), strict=True))
            for place, change in enumerate(changes):
                if not change <= (self._limit or math.inf) * max(base, USUAL):  # which a NaN is not either
                    found[place].append((change, base, name))
        if not found:
            return
        refuse_nonfinite(self._plan)
        faults = Faults()
        for place, changed in sorted(found.items()):
            expert = self._plan.experts[place]
            for change, base, name in sorted(changed, key=lambda one: one[0] / max(one[1], USUAL), reverse=True)[:3]:
                what = f"expert '{expert.name}' changes '{name}' out of all proportion: by {change:.4g}, where the base has {base:.4g}"
                more = f"; so it does {len(changed) - 1} more" if len(changed) > 1 else ""
                fix = "its training went wrong: take an earlier checkpoint, `skip` the tensor, or give `change_limit: null` to merge it so"
                faults.add(f"{what} (root mean squares{more})", where=expert.folder, fix=fix)
        faults.raise_any(CheckpointError)
