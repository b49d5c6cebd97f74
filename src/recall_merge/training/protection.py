"""Training that leaves earlier tasks alone: a penalty on how far their answers move, from input statistics alone (`maths/protection.py`).

Maps that read the same hidden states form a group with one moment, S = sum_q w_q G_q / E_q|W x|^2, |W x|^2 summed over its maps; w_q is 1
for a task, and what the settings say for the base on text of its own. The penalty is strength * mean over groups of the sum over maps of
tr(D S D^T), D the change of a map since training began. Its gradients are known in closed form, and are added to those of the loss: nothing
goes through the graph.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from recall_merge.files.checkpoint import Checkpoint
from recall_merge.maths.moments import Moment, weighted_sum
from recall_merge.maths.protection import energy
from recall_merge.maths.trimming import Draws
from recall_merge.models.tokens import EncodedRow
from recall_merge.training.earlier import OWN, Earlier
from recall_merge.training.rows_of_a import inputs_of, rows_of_a
from recall_merge.training.settings import Protect, RowsOfA
from recall_merge.training.trained_maps import Adapted, TrainedMap, trained_maps

COLUMNS = 64  # directions that the moment of a group keeps of all earlier tasks: in float32 a twentieth of a small model's bytes
RATE, FASTEST = 0.1, 0.5  # of the automatic strength: its logarithm changes by RATE times the excess a step, and by FASTEST at most
FIRST = 0.1  # nats; the automatic strength begins where answers that have moved by all that is tolerated cost as much


@dataclass(frozen=True)
class _Group:
    """Maps that read the same hidden states."""

    names: list[str]
    maps: list[TrainedMap]
    moment: Moment


class Protection(TrainerCallback, ExportableState):
    """Adds the penalty's gradients to those of the loss in every training step.

    Args:
        base: its files name the maps of `model`, which training has not changed yet.
        rows: of the new task.

    Attributes:
        strength: of now; with `auto` it follows how far answers have moved.
        moved: the mean over groups and tasks of E_q|D x|^2 / E_q|W x|^2, after the last step but one.
    """

    def __init__(
        self, earlier: Earlier, settings: Protect, base: Checkpoint, model: Any, *, rows: Sequence[EncodedRow] = (), seed: int
    ) -> None:
        self._settings, self._earlier, self._base = settings, earlier, base
        self._maps = trained_maps(model, base, {name for statistics in earlier.values() for name in statistics.facts["tensors"]})
        self._weights = {task: settings.base if task == OWN else 1.0 for task in earlier}
        self._groups = _grouped(self._maps, earlier, self._weights, seed)
        if (how := settings.rows_of_a) is not None and how != "free":
            _begin_rows(model, self._maps, self._groups, rows, how, seed)
        self.strength = FIRST / settings.tolerance**2 if settings.strength == "auto" else float(settings.strength)
        self.moved = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Where training goes on after a stop, so does the strength."""
        kept = state.stateful_callbacks.get(type(self).__name__, {})
        self.strength = kept.get("attributes", {}).get("strength", self.strength) if isinstance(kept, dict) else self.strength

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"strength": self.strength}}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._groups:
            return
        factor, total = self.strength / len(self._groups), 0.0
        for group in self._groups:
            for each in group.maps:
                total += each.add_pull(group.moment, factor)
        self.moved = float(total) / len(self._groups) / sum(self._weights.values())
        if self._settings.strength == "auto":
            excess = RATE * (self.moved / self._settings.tolerance**2 - 1)
            self.strength *= math.exp(min(excess, FASTEST))

    def facts(self) -> dict[str, Any]:
        """What is recorded of a training: its last strength, how far it has moved answers, by task and layer, and in all by task."""
        moved = moved_answers(self._maps, self._earlier, self._base)
        known = {task: [share for share in layers if share is not None] for task, layers in moved.items()}
        return {
            "strength": self.strength,
            "moved": moved,
            "answers": {task: (sum(shares) / len(shares)) ** 0.5 for task, shares in known.items() if shares},
        }


def _grouped(maps: Mapping[str, TrainedMap], earlier: Earlier, weights: Mapping[str, float], seed: int) -> list[_Group]:
    """The maps in groups that share the inputs in all statistics, which count by their weights."""
    groups = defaultdict[tuple[Any, ...], list[str]](list)
    for name in maps:
        groups[tuple(statistics.facts["tensors"].get(name, [None])[0] for statistics in earlier.values())].append(name)
    made = []
    for names in groups.values():
        moments, shares = [], []
        for task, statistics in earlier.items():
            if (found := statistics.moment(names[0])) is not None:
                moment, _ = found
                moments.append(moment)
                answers = sum(energy(maps[name].weight().float().cpu(), moment) for name in names)
                shares.append(weights[task] / answers if answers > 0 else 0.0)
        moment = weighted_sum(moments, shares, COLUMNS, Draws(seed, names[0], ("earlier tasks",)).streams[0])
        made.append(_Group(names, [maps[name] for name in names], moment.to(maps[names[0]].weight().device)))
    return made


def _begin_rows(
    model: Any, maps: Mapping[str, TrainedMap], groups: Sequence[_Group], rows: Sequence[EncodedRow], how: RowsOfA, seed: int
) -> None:
    """Let the rows of each new adapter's A begin where `how` says; all adapters of a group in the same directions."""
    adapted = {name: each for name, each in maps.items() if isinstance(each, Adapted)}
    moments = inputs_of(model, adapted, rows, lambda name: Draws(seed, name, ("new task",)).streams[0])
    for group in groups:
        first, draw = group.names[0], Draws(seed, group.names[0], ("rows of A",)).streams[0]
        if first in moments:
            directions = rows_of_a(how, moments[first], group.moment.to(torch.device("cpu")), len(adapted[first].down), draw)
            for name in group.names:
                adapted[name].begin(directions)


def moved_answers(maps: Mapping[str, TrainedMap], earlier: Earlier, base: Checkpoint) -> dict[str, list[float | None]]:
    """How far training has moved the answers of each earlier task, by layer: sum over maps of E|D x|^2 / sum over maps of E|W x|^2.

    None for layers without trained maps.
    """
    found: dict[str, list[float | None]] = {}
    for task, statistics in earlier.items():
        moved, answers = ([0.0] * (base.layers.last + 1) for _ in range(2))
        for name, each in maps.items():
            if (known := statistics.moment(name)) is not None:
                moment = known[0].to(each.weight().device)
                moved[base.layers.of(name)] += energy(each.change(), moment)
                answers[base.layers.of(name)] += energy(each.weight().float(), moment)
        found[task] = [change / whole if whole > 0 else None for change, whole in zip(moved, answers, strict=True)]
    return found
