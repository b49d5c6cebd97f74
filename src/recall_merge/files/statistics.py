"""An expert's input statistics: for every linear layer, the second moment of its inputs on the expert's typical samples. They hold no text.

`stats.safetensors` holds, in bfloat16, for each group of maps that read the same hidden state, a factor (i, r) and a diagonal (i,),
and for each map the squared gradients of its outputs (o,). `stats.json` says which tensors of the base belong to which group, what
the input statistics was made from, and of which bytes of the expert.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recall_merge.files.checkpoint import read_json
from recall_merge.files.durable import replacing, write_whole
from recall_merge.files.safetensors import CODES, StoredTensor, TensorSpec, bytes_of, encode_header, read_header
from recall_merge.runtime.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from recall_merge.maths.moments import Moment

STATS, WEIGHTS = "stats.json", "stats.safetensors"
FORMAT = 3
KINDS: dict[str, type] = {
    "expert": str,
    "samples": int,
    "tokens": int,
    "rank": int,
    "rows": list,
}  # of what a merge tells of input statistics


@dataclass(frozen=True)
class InputStatistics:
    """What is known of the inputs of an expert's maps, by the names of the base's tensors. Moments are read when asked for."""

    folder: Path
    facts: Mapping[str, Any]
    stored: Mapping[str, StoredTensor]

    @property
    def nbytes(self) -> int:
        return sum(stored.spec.nbytes for stored in self.stored.values())

    def misfits(self, specs: Mapping[str, TensorSpec]) -> list[str]:
        """The tensors of a base whose inputs or outputs are more or fewer than the input statistics tells of."""

        def told(name: str, group: str, axis: int) -> tuple[int, ...]:
            sizes = self.stored[f"{group}.rest"].spec.shape, self.stored[f"{name}.gradient"].spec.shape
            return sizes[axis == 1] + sizes[axis == 0]

        return [name for name, entry in self.facts["tensors"].items() if name in specs and told(name, *entry) != specs[name].shape]

    def moment(self, name: str) -> tuple[Moment, int] | None:
        """The moment of a tensor's inputs, and the axis along which they run; None where the input statistics tells nothing of it."""
        from recall_merge.maths.moments import Moment

        entry = self.facts["tensors"].get(name)
        if entry is None:
            return None
        group, axis = entry
        return Moment(self._read(f"{group}.factor"), self._read(f"{group}.rest"), self._read(f"{name}.gradient")), axis

    def _read(self, part: str) -> Tensor:
        return self.stored[part].read().float()


def parts_of(group: str) -> tuple[str, str]:
    """Names of the numbers that a group of maps has in common."""
    return f"{group}.factor", f"{group}.rest"


def write_statistics(folder: Path, parts: Mapping[str, Tensor], tensors: Mapping[str, tuple[str, int]], facts: Mapping[str, Any]) -> Path:
    """Write input statistics into a folder: the numbers first, then, in one step, the file that makes them input statistics.

    Args:
        parts: the numbers by name, as `parts_of` names them.
        tensors: name of a tensor of the base -> its group, and the axis of its inputs.
        facts: what it was made from; `expert` holds the hashes that tell whether it still belongs to the expert.
    """
    import torch

    parts = {name: tensor.to(torch.bfloat16) for name, tensor in parts.items()}
    specs = {name: TensorSpec(CODES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape)) for name, tensor in parts.items()}
    with replacing(folder / WEIGHTS) as partial, partial.open("wb") as file:
        file.write(encode_header(specs))
        for tensor in parts.values():
            file.write(bytes_of(tensor))
    text = json.dumps({"format": FORMAT, **facts, "tensors": {name: list(entry) for name, entry in tensors.items()}}, indent=1) + "\n"
    write_whole(folder / STATS, text)
    return folder / STATS


def has_statistics(folder: Path) -> bool:
    return (folder / STATS).exists()


def open_statistics(folder: Path) -> InputStatistics | None:
    """The input statistics of a folder; None if it has none.

    Raises:
        CheckpointError: if it is damaged, or of a form that this version does not know.
    """
    if not has_statistics(folder):
        return None
    facts = read_json(folder / STATS)
    fix = "make it again with `recall stats`"
    if facts.get("format") != FORMAT or not isinstance(facts.get("tensors"), dict):
        raise CheckpointError("the input statistics is of a form that this version does not know", where=folder / STATS, fix=fix)
    if not all(isinstance(facts.get(key), kind) for key, kind in KINDS.items()) or not all(map(_is_entry, facts["tensors"].values())):
        raise CheckpointError("the input statistics is damaged", where=folder / STATS, fix=fix)
    stored = read_header(folder / WEIGHTS)
    wanted = {part for name, (group, _) in facts["tensors"].items() for part in (*parts_of(group), f"{name}.gradient")}
    if missing := sorted(wanted - set(stored)):
        raise CheckpointError(f"the input statistics lacks '{missing[0]}'", where=folder / WEIGHTS, fix=fix)
    for group in sorted({group for group, _ in facts["tensors"].values()}):
        factor, rest = (stored[part].spec for part in parts_of(group))
        if not (factor.is_float and rest.is_float and len(factor.shape) == 2 and factor.shape[:1] == rest.shape):
            told = f"{factor}, {rest}"
            raise CheckpointError(
                f"the input statistics's numbers of '{group}' are no factor and rest: {told}", where=folder / WEIGHTS, fix=fix
            )
    return InputStatistics(folder, facts, stored)


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) and entry[1] in (0, 1)
