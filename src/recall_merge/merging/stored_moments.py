"""What is kept of an expert's inputs: their moments, and the tensors of the base's files that these belong to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from recall_merge.files.checkpoint import Checkpoint
from recall_merge.files.experts import Expert
from recall_merge.files.fused import MadeOtherwise, Place, Places
from recall_merge.files.names import Names
from recall_merge.files.statistics import Owner, gradient_of, parts_of
from recall_merge.maths.moments import Moment, weighted_sum
from recall_merge.maths.trimming import Start
from recall_merge.merging.unsound import is_finite
from recall_merge.models.reads import Map, linear_maps
from recall_merge.runtime.errors import CheckpointError

if TYPE_CHECKING:
    from recall_merge.models.input_moments import Inputs

TRAINING = "look at its training"


@dataclass(frozen=True)
class LinearMap:
    """A parameter in memory that is a linear map, or holds one for each expert of a mixture; and the tensors of the files that make it."""

    shape: tuple[int, ...]
    places: Sequence[Place]


@dataclass(frozen=True)
class Found:
    """What was found out about the inputs of linear maps, all by the names of parameters in memory."""

    maps: Mapping[str, LinearMap]
    inputs: Sequence[Inputs]
    gradients: Mapping[str, Tensor] = field(default_factory=dict)  # squared, of the outputs: (o,) or (E, o)


def maps_in_files(base: Checkpoint, model: Any, notes: list[str]) -> dict[str, LinearMap]:
    """The linear maps of a model that can be aligned. A head is none of them; `notes` learns of mixtures that cannot be taken apart."""
    names = Names(base)
    found: dict[str, LinearMap] = {}
    mixtures: dict[str, tuple[int, ...]] = {}
    for name, shape in linear_maps(model).items():
        if len(shape) == 3:
            mixtures[name] = shape
        elif (stored := names.find(name)) is not None and stored not in base.token_tensors:
            found[name] = LinearMap(shape, [Place(stored)])
    for known in names.models if mixtures else ():
        places = Places(known, base)
        for name in mixtures.keys() & known.parameters.keys() - found.keys():
            try:
                found[name] = LinearMap(mixtures[name], places.of(name))
            except MadeOtherwise as error:
                notes.append(f"there are no input statistics of '{name}', which transformers makes of other tensors by {error}")
    return found


class StoredMoments:
    """What goes into the files of input statistics.

    Experts of a mixture that have read fewer tokens than there are directions to keep share the mean of all of their block's.

    Attributes:
        parts: the numbers by name, in bfloat16.
        tensors: the groups of inputs of each tensor of the base, and the axis along which they run.
        mixtures: experts of mixtures that share a mean, and all.
    """

    def __init__(self, found: Found, expert: Expert, rank: int, draw: Callable[[str], Start]) -> None:
        self.parts: dict[str, Tensor] = {}
        self.tensors: dict[str, tuple[Owner, int]] = {}
        self._expert, self._rank, self._draw = expert, rank, draw
        self._reads_enough: dict[tuple[str, int], bool] = {}  # of an expert of a mixture, by its module and number
        self._inputs = {map_: (f"{number:05d}", group) for number, group in enumerate(found.inputs) for map_ in group.maps}
        for name, known in found.maps.items():
            if len(known.shape) == 3:
                self._add_mixture(name, known, found.gradients.get(name))
            elif (name, None) in self._inputs:
                key, group = self._inputs[Map(name)]
                stored = known.places[0].name
                self._keep_moment(key, group.moment, stored)
                self.tensors[stored] = (key, group.axis)
                if name in found.gradients:
                    self._keep(gradient_of(stored), found.gradients[name], stored)

    @property
    def mixtures(self) -> list[int]:
        return [[*self._reads_enough.values()].count(False), len(self._reads_enough)]

    def _add_mixture(self, name: str, known: LinearMap, gradients: Tensor | None) -> None:
        experts = range(known.shape[0])
        read = {expert: self._inputs[Map(name, expert)] for expert in experts if (name, expert) in self._inputs}
        if not read:
            return
        groups = [group for _, group in read.values()]
        keys = {expert: key for expert, (key, group) in read.items() if group.tokens >= self._rank}
        for expert in experts:
            self._reads_enough[name.rpartition(".")[0], expert] = expert in keys
        for expert, key in keys.items():
            self._keep_moment(key, read[expert][1].moment, name)
        if len(keys) < len(experts):
            shares = [group.tokens / sum(group.tokens for group in groups) for group in groups]
            mean = weighted_sum([group.moment for group in groups], shares, self._rank, self._draw(name))
            self._keep_moment(name, mean, name)
        owners = [keys.get(expert, name) for expert in experts]
        for place in known.places:
            self.tensors[place.name] = (owners if place.expert is None else owners[place.expert], groups[0].axis ^ place.turned)
            if gradients is not None:
                own = gradients if place.expert is None else gradients[place.expert]
                outputs = slice(None) if place.rows is None else slice(place.rows.start, place.rows.stop)
                self._keep(gradient_of(place.name), own[..., outputs], place.name)

    def _keep_moment(self, key: str, moment: Moment, name: str) -> None:
        for part, numbers in zip(parts_of(key), (moment.factor, moment.rest), strict=True):
            self._keep(part, numbers, name)

    def _keep(self, part: str, numbers: Tensor, name: str) -> None:
        self.parts[part] = numbers.bfloat16()
        if not is_finite(self.parts[part]):
            what = f"the input statistics of expert '{self._expert.name}' overflow in '{name}'"
            raise CheckpointError(what, where=self._expert.folder, fix=TRAINING)
