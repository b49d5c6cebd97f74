"""Options that several methods share: a type, its range, and what it means in words (the last string of each `Annotated`)."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Interval

Fraction = Annotated[float, Interval(gt=0, le=1)]
Scale = Annotated[float, "factor on the merged change, the papers' lambda or alpha"]
