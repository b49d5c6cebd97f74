"""One parameter that holds all experts of a block: the tensors of the files that make it, and PEFT's factors of it taken apart for them.

The files may hold the parameter whole, turned, in parts, or expert by expert, as transformers' conversion mapping tells, of whose
operations three are known here. With `target_parameters`, PEFT keeps the factors of E experts side by side, A (E r, in) and B (out, r E),
without saying of which parameter they are: it wraps the targeted parameters of a module in their order, each around the one before
(`ParamWrapper` of peft 0.21).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from recall_merge.files.checkpoint import Checkpoint
from recall_merge.files.edits import COPY_AGAIN, MERGE_FIRST, OTHER_BASE, Edit, FactorOfExperts
from recall_merge.files.names import InMemory, Names
from recall_merge.files.safetensors import StoredTensor
from recall_merge.runtime.errors import CheckpointError, Faults

Scale = Callable[[str, int], float]
"""alpha / r of a module or parameter, from its name and r."""


@dataclass(frozen=True)
class Place:
    """A tensor of the files that is a part of a parameter in memory."""

    name: str
    expert: int | None = None  # whose matrix it is; None if it is a part of all of them
    rows: range | None = None  # of each matrix, if these are not all
    turned: bool = False  # it holds the transposes


class Places:
    """Where the parameters of a model come from in the files."""

    def __init__(self, model: InMemory, base: Checkpoint) -> None:
        self._model, self._base = model, base
        self._stored: defaultdict[str, list[str]] = defaultdict(list)
        for name in base.tensors:
            self._stored[model.place(name)[0]].append(name)

    def of(self, parameter: str) -> list[Place]:
        """The tensors of the files that make a parameter. `MadeOtherwise` if it is made in a way that is not known here."""
        model = self._model
        groups, converter = model.made_of(self._stored[parameter])
        listed = converter.operations if converter else []
        operations: dict[str, Any] = {type(operation).__name__: operation for operation in listed}
        stacked, joined, turned = (operations.get(kind) for kind in ("MergeModulelist", "Concatenate", "Transpose"))
        known = operations.keys() <= {"MergeModulelist", "Concatenate", "Transpose"} and len(operations) == len(listed)
        known &= (not stacked or stacked.dim == 0) and (not joined or (joined.dim == 1 and not model.is_transposed(parameter)))
        known &= not turned or (len(operations) == 1 and {turned.dim0, turned.dim1} == {1, 2})
        places, height = [], 0
        for group in groups:
            shapes = [self._base.tensors[part].spec.shape for part in group]
            rows = range(height, height := height + shapes[0][-2]) if joined else None
            for number, part in enumerate(group):
                turn = turned is not None and not (turned.check_dims and shapes[number] == model.parameters[parameter])
                places.append(Place(part, number if stacked else None, rows, turn))
        if not known or sum(self._base.tensors[place.name].spec.numel for place in places) != math.prod(model.parameters[parameter]):
            raise MadeOtherwise(" and ".join(operations) or "renaming")
        return places


class MadeOtherwise(Exception):
    """A parameter is made of the files' tensors by these operations of transformers, which are not known here."""


class TargetParameters:
    """Collects the factors of the parameters that an adapter's config targets, and turns them into edits of the files' tensors."""

    def __init__(self, config: Mapping[str, Any], names: Names, base: Checkpoint, where: Path) -> None:
        self._targets = tuple(f".{target}" for target in config.get("target_parameters") or ())
        self._names, self._base, self._where = names, base, where
        self._factors: dict[str, dict[int, dict[str, StoredTensor]]] = {}  # by module, how deep they lie in it, and kind

    def take(self, module: str, kind: str, part: StoredTensor) -> bool:
        """Keep a factor until all are there; False if it is of a module that the config does not target so."""
        owner, depth = module.replace(".base_layer", ""), module.count(".base_layer")
        if kind not in ("lora_A", "lora_B") or not (depth or any(owner in owners for _, owners in self._models)):
            return False
        if not self._factors.setdefault(owner, {}).setdefault(depth, {}).setdefault(kind, part).same_bytes(part):
            raise CheckpointError(
                f"the adapter gives '{kind}' of '{module}' twice, with different values", where=self._where, fix=COPY_AGAIN
            )
        return True

    def edits(self, scale: Scale, faults: Faults) -> dict[str, Edit]:
        """The edits of the base's tensors."""
        edits: dict[str, Edit] = {}
        if not self._factors and all(not owners for _, owners in self._models) and (self._models or not self._targets):
            return edits  # a model may have none of the experts that PEFT's config of its kind names
        if not (fitting := [each for each in self._models if each[1] and self._factors.keys() <= each[1].keys()]):
            name = min([*self._factors, *(target[1:] for target in self._targets)])
            what = f"the adapter changes parameters of '{name}' that its config does not target, or transformers does not know"
            faults.add(what, where=self._where, fix=MERGE_FIRST)
            return edits
        model, owners = fitting[0]
        places = Places(model, self._base)
        for owner, parameters in owners.items():
            depths = self._factors.get(owner, {})
            for depth, name in enumerate(reversed(parameters)):
                with faults.collect():
                    edits |= self._edits_of(model, name, places, depths.get(depth, {}), scale)
            if max(depths, default=0) >= len(parameters):
                what = f"the adapter has factors of more than the {len(parameters)} parameters of '{owner}' that its config targets"
                faults.add(what, where=self._where, fix=COPY_AGAIN)
        return edits

    @cached_property
    def _models(self) -> list[tuple[InMemory, dict[str, list[str]]]]:
        """The base's models in memory; by module, the parameters that the config targets, in the order in which PEFT wraps them."""
        found: list[tuple[InMemory, dict[str, list[str]]]] = []
        for model in self._names.models if self._targets else ():
            owners: dict[str, list[str]] = {}
            for name in model.parameters:
                if f".{name}".endswith(self._targets):
                    owners.setdefault(name.rpartition(".")[0], []).append(name)
            found.append((model, owners))
        return found

    def _edits_of(self, model: InMemory, name: str, places: Places, factors: Mapping[str, StoredTensor], scale: Scale) -> dict[str, Edit]:
        if missing := {"lora_A", "lora_B"} - factors.keys():
            what = f"the adapter lacks '{min(missing)}' of '{name}', which its config says it changes"
            raise CheckpointError(what, where=self._where, fix=COPY_AGAIN)
        shape, transposed, down, up = model.parameters[name], model.is_transposed(name), factors["lora_A"], factors["lora_B"]
        experts = shape[0] if len(shape) == 3 else 1
        *_, height, width = (experts, *shape[:-3:-1]) if transposed else shape
        (rank, *wide), (high, *ranks) = down.spec.shape, up.spec.shape
        if [high, *wide, *ranks] != [height, width, rank] or not rank or rank % experts:
            what = f"the adapter changes '{name}', {shape} in the base, by factors of shapes {up.spec.shape} and {down.spec.shape}"
            raise CheckpointError(what, where=self._where, fix=OTHER_BASE)
        edits, factor = {}, scale(name, rank // experts)
        try:
            found = places.of(name)
        except MadeOtherwise as error:
            what = f"the adapter changes '{name}', which transformers makes of other tensors by {error}"
            raise CheckpointError(what, where=self._where, fix=MERGE_FIRST) from None
        for place in found:
            expert = place.expert if len(shape) == 3 else 0
            b, a = FactorOfExperts(up, experts, True, expert, place.rows), FactorOfExperts(down, experts, False, expert)
            if transposed != place.turned:
                b, a = replace(a, turned=True), replace(b, turned=True)
            edits[place.name] = Edit(up=b, down=a, scale=factor)
        return edits
