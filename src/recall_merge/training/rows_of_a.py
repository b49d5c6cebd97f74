"""Where the rows of a new adapter's A begin, if not at random: in directions that the new task's inputs have, and earlier tasks' lack.

B is 0 then, so nothing is answered differently yet; but it is in these directions that the change D = s B A begins to grow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from recall_merge.maths.moments import Moment
from recall_merge.maths.protection import free_directions, shared_directions
from recall_merge.maths.trimming import Start
from recall_merge.models.input_moments import InputSketches, inputs_of_whole
from recall_merge.models.tokens import EncodedRow
from recall_merge.runtime.errors import RunError
from recall_merge.training.settings import RowsOfA
from recall_merge.training.trained_maps import Adapted

SEEN = 1024  # tokens of the new task, of rows evenly spaced, whose inputs are seen: a few hundredths of the time of a training
DIRECTIONS = 32  # that are kept of them


def inputs_of(model: Any, maps: Mapping[str, Adapted], rows: Sequence[EncodedRow], draw: Callable[[str], Start]) -> dict[str, Moment]:
    """The moments of what each map reads of some of the rows, in the model as it is; those that read nothing are left out.

    Raises RunError if the model's logits are not finite.
    """
    paths = {module: path for path, module in model.named_modules()}
    names = {name: f"{paths[each.inner]}.weight" for name, each in maps.items()}
    shapes = {parameter: tuple(maps[name].inner.weight.shape) for name, parameter in names.items()}
    share = SEEN / max(SEEN, sum(len(row.input_ids) for row in rows))
    chosen = [row for number, row in enumerate(rows) if int((number + 1) * share) > int(number * share)] or rows[:1]
    was_training = model.training
    model.eval()
    try:
        found = inputs_of_whole(model, chosen, InputSketches(shapes, DIRECTIONS, draw, held=2 * SEEN))
    except FloatingPointError as error:
        raise RunError("the logits of the model are NaN or infinite", fix="look at the base, and at the rows") from error
    finally:
        model.train(was_training)
    moments = {map_.parameter: inputs.moment for inputs in found for map_ in inputs.maps}
    return {name: moments[parameter] for name, parameter in names.items() if parameter in moments}


def rows_of_a(how: RowsOfA, new: Moment, old: Moment, count: int, draw: Start) -> Tensor:
    """Directions of length 1, (n, i), n <= count: free of the old tasks, or half of them free and half where both tasks' inputs lie."""
    if how == "isolated":
        return free_directions(new, old, count)
    free = free_directions(new, old, count // 2)
    return torch.cat([free, shared_directions(new, old, count - len(free), draw)])
