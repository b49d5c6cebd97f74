"""Options that several methods share: a type, its range, and what it means in words (the last string of each `Annotated`)."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Interval

Fraction = Annotated[float, Interval(gt=0, le=1)]
Scale = Annotated[float, "factor on the merged change, the papers' lambda or alpha"]
Vectors = Annotated[
    Literal["whole", "rows", "columns"],
    "what counts as one vector: the whole tensor, each row (along its last axis) or each column (along its first)",
]
Sphere = Annotated[Literal["weights", "deltas"], "which vectors lie on the sphere: the experts' weights or their deltas"]
