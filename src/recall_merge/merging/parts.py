"""Parts of a run: tensors selected by name, kind or layer, with weights or options of their own."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, cast

from recall_merge.maths.layers import Layers
from recall_merge.maths.weights import along_blocks, normalised
from recall_merge.merging.run import Part
from recall_merge.runtime.errors import Faults, RunError

GivenWeights = tuple[float, ...] | tuple[tuple[float, ...], ...]
"""One number per expert, or one such row per layer; each row sums to 1."""


@dataclass(frozen=True)
class RampPoints:
    """Rows with one number per expert, to be spread evenly over the blocks."""

    rows: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class PartRules:
    """A part of the run with its weights, and the method's options that it changes."""

    part: Part
    weights: GivenWeights | RampPoints | None
    options: dict[str, Any]

    def fits(self, name: str, names: Collection[str], layers: Layers) -> bool:
        """Whether the part selects a tensor."""
        words, kinds = _listed(self.part.filter), _listed(self.part.kind)
        return (
            (words is None or any(_matches(name, word, names) for word in words))
            and (kinds is None or layers.kind_of(name) in kinds)
            and (self.part.layers is None or layers.of(name) in self.part.layers)
        )


@dataclass(frozen=True)
class Override:
    """Weights that one tensor has instead of its layer's, and options that it has instead of the run's."""

    weights: tuple[float, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def overrides_of_tensors(parts: Sequence[PartRules], names: Sequence[str], layers: Layers) -> dict[str, Override]:
    """The overrides of each tensor that a part selects. Of several parts, the first that gives a setting counts.

    RunError names every part that selects no tensor, or has weights for other layers.
    """
    faults, all_names = Faults(), frozenset(names)
    overrides: dict[str, Override] = {}
    for number, part in reversed([*enumerate(parts)]):  # so that the first part has the last word
        weights: GivenWeights | None = None
        with faults.collect():
            weights = None if part.weights is None else weights_per_layer(part.weights, layers, f"parts.{number}.weights")
        selected = [name for name in names if part.fits(name, all_names, layers)]
        for name in selected:
            before = overrides.get(name, Override())
            row = before.weights if weights is None else _row_of(weights, layers.of(name))
            overrides[name] = Override(row, {**before.options, **part.options})
        if not selected:
            selectors = part.part.model_dump(include={"filter", "kind", "layers"}, exclude_none=True)
            what = f"a part selects no tensor: {', '.join(f'{key} {value}' for key, value in selectors.items())}"
            faults.add(what, where=f"parts.{number}", fix=_suggestion(part.part, names, layers))
    faults.raise_any(RunError)
    return overrides


def weights_per_layer(weights: GivenWeights | RampPoints, layers: Layers, where: str) -> GivenWeights:
    """Given weights for a base with these layers, neither more nor fewer; a ramp becomes one row per layer."""
    if isinstance(weights, RampPoints):
        return tuple(tuple(normalised(row)) for row in along_blocks(weights.rows, layers.blocks))
    if isinstance(weights[0], tuple) and len(weights) != layers.last + 1:
        what = f"there are weights for {len(weights)} layers; the base has {layers.last + 1}, from 0 to {layers.last}"
        raise RunError(what, where=f"{where}.by_layer", fix="0 is the embedding, the last one final norm and head")
    return weights


def _row_of(weights: GivenWeights, layer: int) -> tuple[float, ...]:
    return cast("tuple[float, ...]", weights[layer] if isinstance(weights[0], tuple) else weights)


def _suggestion(part: Part, names: Sequence[str], layers: Layers) -> str:
    """What the author of a part that selects nothing may have meant."""
    patterns = sorted({re.sub(rf"^({re.escape(layers.prefix)})\.\d+", r"\1.*", name) for name in names})  # one per tensor of a block
    if (words := _listed(part.filter)) is not None and not any(_matches(name, word, names) for word in words for name in names):
        choices = [word for name in patterns for word in (name, *name.split("."))]
        close = get_close_matches(words[0].strip("*"), choices, n=3, cutoff=0.5)
        return f"near it: {', '.join(dict.fromkeys(close))}" if close else f"the tensors are {', '.join(patterns)}"
    kinds = {layers.kind_of(name) for name in names}
    if (wanted := _listed(part.kind)) is not None and not kinds & set(wanted):
        tied = "; the head is tied to the embedding" if "head" in wanted else ""
        return f"the kinds of its tensors are {', '.join(sorted(kinds))}{tied}"
    return f"the layers are 0 to {layers.last}; all of `filter`, `kind` and `layers` must fit"


def _matches(name: str, word: str, names: Collection[str]) -> bool:
    """Whether a word of a filter selects a tensor: as a pattern, as a whole name (which selects no other), or as a part of the name."""
    return fnmatchcase(name, word) if "*" in word else name == word if word in names else word in name


def _listed(value: Any) -> list[str] | None:
    return value if value is None or isinstance(value, list) else [value]
