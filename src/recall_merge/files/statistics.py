"""An expert's input statistics: for every linear layer, the second moment of its inputs on the expert's typical samples. They hold no text.

`stats.safetensors` holds, in bfloat16, for each group of layers with the same inputs a factor (i, r) and a diagonal (i,); and for each
layer, where they were asked for, the squared gradients of its outputs (o,). `stats.json` says which tensors of the base belong to which
group, what the statistics were made from, the hash of their expert, and those of both files. A tensor (E, .., ..) that holds a matrix for
each expert of a mixture belongs to E groups, and its gradients are (E, o).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recall_merge.files.hashing import hash_result
from recall_merge.files.safetensors import StoredTensor, TensorSpec, bytes_of, encode_header, read_header
from recall_merge.runtime.durable import replacing, write_whole
from recall_merge.runtime.errors import CheckpointError
from recall_merge.runtime.sealed import read_sealed, sealed

if TYPE_CHECKING:
    from torch import Tensor

    from recall_merge.files.checkpoint import Checkpoint
    from recall_merge.maths.moments import Moment

STATS, WEIGHTS = "stats.json", "stats.safetensors"
FORMAT = 4
OLDER = 3  # without hashes
MIXTURES = "mixtures"  # the fact how many experts of mixtures share the mean of their block, and how many there are
GRADIENTS = "gradients"  # the fact that they were asked for; statistics that do not say so have them
KINDS = {"expert": str, "samples": int, "tokens": int, "rank": int, "rows": list}  # types of the facts that a merge reports

Owner = str | list[str]
"""The group of a tensor's inputs; or one for each expert of a mixture, whose matrices the tensor holds."""


@dataclass(frozen=True)
class InputStatistics:
    """The moments of the inputs of an expert's linear layers, by the base's tensor names. They are read when needed."""

    folder: Path
    facts: Mapping[str, Any]
    stored: Mapping[str, StoredTensor]

    @property
    def nbytes(self) -> int:
        return sum(stored.spec.nbytes for stored in self.stored.values())

    @property
    def has_gradients(self) -> bool:
        return self.facts.get(GRADIENTS, True)

    @property
    def mixtures(self) -> tuple[int, int]:
        """How many experts of mixtures share the mean of their block, since they read fewer tokens than there are directions; and all."""
        thin, experts = self.facts.get(MIXTURES, (0, 0))
        return thin, experts

    def misfits(self, specs: Mapping[str, TensorSpec]) -> list[str]:
        """The base's tensors whose shape does not fit the inputs here, or the gradients of the outputs."""

        def fits(name: str, owner: Owner, axis: int) -> bool:
            gradient, experts = self.stored.get(gradient_of(name)), () if isinstance(owner, str) else (len(owner),)
            if len(specs[name].shape) != len(experts) + 2:
                return False
            *lead, height, width = specs[name].shape
            outputs, inputs = (height, width) if axis == 1 else (width, height)
            fitting = all(self.stored[parts_of(group)[1]].spec.shape == (inputs,) for group in groups_of(owner))
            return fitting and tuple(lead) == experts and (gradient is None or gradient.spec.shape == (*experts, outputs))

        return [name for name, entry in self.facts["tensors"].items() if name in specs and not fits(name, *entry)]

    def moment(self, name: str, expert: int | None = None) -> tuple[Moment, int] | None:
        """The moment of a tensor's inputs, or of those of one expert of a mixture; and the axis of the inputs.

        None if there are no statistics of the tensor.
        """
        from recall_merge.maths.moments import Moment

        entry = self.facts["tensors"].get(name)
        if entry is None:
            return None
        owner, axis = entry
        factor, rest = (self.stored[part].read().float() for part in parts_of(owner if expert is None else owner[expert]))
        gradient = self.stored[gradient_of(name)].read().float() if gradient_of(name) in self.stored else None
        return Moment(factor, rest, gradient if gradient is None or expert is None else gradient[expert]), axis


def check_base(statistics: InputStatistics, whose: str, base: Checkpoint, *, known: bool = True) -> None:
    """Raise CheckpointError if input statistics were made on another base, or do not fit the shapes of this one.

    Args:
        whose: they are, in words.
        known: the base's numbers are here, so that it can be told from others.
    """
    fix = "make them again with `recall stats`"
    if known and statistics.facts.get("base", base.fingerprint) != base.fingerprint:
        raise CheckpointError(f"the input statistics of {whose} were made on another base", where=statistics.folder, fix=fix)
    if misfits := statistics.misfits(base.specs):
        raise CheckpointError(f"the input statistics of {whose} do not fit the inputs of '{misfits[0]}'", where=statistics.folder, fix=fix)


def groups_of(owner: Owner) -> list[str]:
    """The groups of a tensor: one, or one for each expert of a mixture."""
    return [owner] if isinstance(owner, str) else owner


def parts_of(group: str) -> tuple[str, str]:
    """Names of the stored tensors that the layers of a group share."""
    return f"{group}.factor", f"{group}.rest"


def gradient_of(name: str) -> str:
    """Name of the squared gradients of a layer's outputs, by that of its tensor in the base."""
    return f"{name}.gradient"


def write_statistics(folder: Path, parts: Mapping[str, Tensor], tensors: Mapping[str, tuple[Owner, int]], facts: Mapping[str, Any]) -> Path:
    """Write input statistics into a folder: the tensors first, then, in one step, the facts that make them valid.

    `parts` are the stored tensors, named as by `parts_of` and `gradient_of`. `tensors` gives for each tensor of the base its group, or one
    for each expert of a mixture, and the axis of the inputs. `facts` say what the statistics were made from, `expert` among them: the hash
    of the expert that they belong to.
    """
    import torch

    parts = {name: tensor.to(torch.bfloat16) for name, tensor in parts.items()}
    with replacing(folder / WEIGHTS) as partial:
        with partial.open("wb") as file:
            file.write(encode_header({name: TensorSpec.of(tensor) for name, tensor in parts.items()}))
            for tensor in parts.values():
                file.write(bytes_of(tensor))
        known = {"format": FORMAT, WEIGHTS: hash_result(partial), **facts}
    write_whole(folder / STATS, sealed({**known, "tensors": {name: list(entry) for name, entry in tensors.items()}}))
    return folder / STATS


def has_statistics(folder: Path) -> bool:
    return (folder / STATS).exists()


def open_statistics(folder: Path) -> InputStatistics | None:
    """The input statistics in a folder, or None. Raises CheckpointError if they are damaged, or in an unknown format."""
    if not has_statistics(folder):
        return None
    fix = "make them again with `recall stats`"
    facts = read_sealed(folder / STATS, since=FORMAT, again=fix)
    if facts.get("format") not in (OLDER, FORMAT) or not isinstance(facts.get("tensors"), dict):
        raise CheckpointError("the input statistics are in a format that this version does not know", where=folder / STATS, fix=fix)
    entries = facts["tensors"].values()
    sound = all(isinstance(entry, list) and len(entry) == 2 and _is_owner(entry[0]) and entry[1] in (0, 1) for entry in entries)
    sound = sound and isinstance(facts.get(GRADIENTS, True), bool) and _are_counts(facts.get(MIXTURES, [0, 0]))
    if not sound or not all(isinstance(facts.get(key), kind) for key, kind in KINDS.items()):
        raise CheckpointError("the input statistics are damaged", where=folder / STATS, fix=fix)
    stored = read_header(folder / WEIGHTS)
    if facts["format"] == FORMAT and hash_result(folder / WEIGHTS) != facts.get(WEIGHTS):
        raise CheckpointError(f"{WEIGHTS} has changed since it was written, or is of other statistics", where=folder / WEIGHTS, fix=fix)
    groups = sorted({group for owner, _ in facts["tensors"].values() for group in groups_of(owner)})
    wanted = {part for group in groups for part in parts_of(group)}
    wanted |= {gradient_of(name) for name in facts["tensors"] if facts.get(GRADIENTS, True)}
    if missing := sorted(wanted - set(stored)):
        raise CheckpointError(f"the input statistics lack '{missing[0]}'", where=folder / WEIGHTS, fix=fix)
    for group in groups:
        factor, rest = (stored[part].spec for part in parts_of(group))
        if not (factor.is_float and rest.is_float and len(factor.shape) == 2 and factor.shape[:1] == rest.shape):
            what = f"the input statistics of group '{group}' are not a factor and a rest: {factor}, {rest}"
            raise CheckpointError(what, where=folder / WEIGHTS, fix=fix)
    return InputStatistics(folder, facts, stored)


def _is_owner(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and all(isinstance(group, str) for group in value))


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(count) is int for count in value)
