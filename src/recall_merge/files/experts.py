"""An expert as a merge reads it: what it changed in each tensor of the base, whether it is a checkpoint or an adapter."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from recall_merge.files.adapter import CONFIG, WEIGHTS, Adapter
from recall_merge.files.checkpoint import Checkpoint
from recall_merge.files.hashing import ModelDigest, hash_file, hash_model
from recall_merge.files.safetensors import TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from recall_merge.maths.deltas import Delta


@dataclass(frozen=True)
class Expert:
    """What a merge needs to know about an expert; here, about one that changes nothing.

    Tensors are float32 or better, and have the names and shapes of the base.
    """

    name: str
    source: Checkpoint | Adapter

    @property
    def folder(self) -> Path:
        return self.source.folder

    @property
    def nbytes(self) -> int:
        """Bytes to read for all of its tensors once."""
        return self.source.nbytes

    def spec(self, name: str) -> TensorSpec | None:
        """Dtype and shape of its own version of a tensor; None if it has the base's."""
        return None

    def comes_in_pieces(self, name: str) -> bool:
        """Whether `delta` can compute a part of this tensor without the rest."""
        return True

    def delta(self, name: str, base: Tensor, span: range | None = None) -> Delta | None:
        """What it adds to `base`, (*s); None if nothing. With a span, `base` and the result are those numbers of the tensor."""
        return None

    def own(self, name: str, base: Tensor) -> Tensor:
        """Its own tensor; a token tensor may have other rows than `base`."""
        return base

    def hashes(self) -> dict[str, str]:
        """Its contents, for the record."""
        return {}


@dataclass(frozen=True)
class FullExpert(Expert):
    """An expert that is a whole checkpoint."""

    source: Checkpoint
    digest: ModelDigest = field(default_factory=ModelDigest, compare=False, repr=False)

    def spec(self, name: str) -> TensorSpec | None:
        return self.source.tensors[name].spec

    def delta(self, name: str, base: Tensor, span: range | None = None) -> Delta | None:
        stored = self.source.read(name, span)
        if span:
            self.digest.add_piece(name, self.source.tensors[name].spec, span.start, stored)
        else:
            self.digest.add(name, stored)
        return _minus(stored, base)

    def read_delta(self, name: str, base: Tensor, span: range) -> Tensor:
        """A span of its delta, not added to the digest: for a pass before the one that merges."""
        return _minus(self.source.read(name, span), base)

    def own(self, name: str, base: Tensor) -> Tensor:
        return self.source.read(name).to(base.dtype)

    def hashes(self) -> dict[str, str]:
        return {"tensors": self.digest.hexdigest()}


@dataclass(frozen=True)
class AdapterExpert(Expert):
    """An expert that is an adapter on the base."""

    source: Adapter

    def spec(self, name: str) -> TensorSpec | None:
        edit = self.source.edits.get(name)
        return edit.replace.spec if edit and edit.replace else None

    def comes_in_pieces(self, name: str) -> bool:
        return name not in self.source.edits

    def delta(self, name: str, base: Tensor, span: range | None = None) -> Delta | None:
        edit = self.source.edits.get(name)
        return edit.delta(base) if edit else None

    def own(self, name: str, base: Tensor) -> Tensor:
        edit = self.source.edits.get(name)
        return edit.apply(base) if edit else base

    def hashes(self) -> dict[str, str]:
        return {file: hash_file(self.folder / file) for file in (CONFIG, WEIGHTS)}


@dataclass(frozen=True)
class BaseExpert(Expert):
    """The base as one of the models: it changes nothing, so it is not read again."""

    source: Checkpoint

    @property
    def nbytes(self) -> int:
        return 0


def own_tensors(expert: Expert, base: Checkpoint, merges: Callable[[str], bool]) -> dict[str, Tensor]:
    """The expert's whole model, in float32, under the base's names, to run its forward pass.

    `merges` tells which tensors are the expert's own; the others are the base's, as in the result.
    """

    own = ((name, own_tensor(expert, base, name, merges)) for name in base.tensors)
    return {name: widen(tensor) if merges(name) else tensor for name, tensor in own}


def own_tensor(expert: Expert, base: Checkpoint, name: str, merges: Callable[[str], bool]) -> Tensor:
    """One tensor of `own_tensors`; in its own dtype where that loses nothing."""
    if not merges(name):
        return base.read(name)
    if isinstance(expert, FullExpert):
        return expert.source.read(name)
    stored = base.read(name)
    return stored if expert.comes_in_pieces(name) else expert.own(name, widen(stored))


def own_rows(
    expert: Expert, base: Checkpoint, name: str, rows: Iterable[int], merges: Callable[[str], bool], *, dtype: torch.dtype
) -> Tensor:
    """A tensor of which only some rows are read; the others are 0, and take no memory until they are written to.

    `dtype` is the dtype of its use; converting it later would write to all rows.
    """
    from recall_merge.runtime.memory import zeros

    source = expert.source if isinstance(expert, FullExpert) and merges(name) else base
    spec = source.tensors[name].spec
    tensor = zeros(spec.shape, dtype)
    width = spec.numel // max(1, spec.shape[0])
    for row in rows:
        tensor[row] = source.read(name, range(row * width, (row + 1) * width)).view(tensor.shape[1:])
    return tensor


def widen(tensor: Tensor) -> Tensor:
    """In float32, or in its own dtype if that is wider."""
    import torch

    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def hash_expert(expert: Expert) -> str:
    """A hash of an expert's present state: SHA-256 of an adapter's files, or of a checkpoint's weights and config."""
    if isinstance(expert.source, Checkpoint):
        return hash_model(expert.source)
    return hash_adapter(expert.hashes())


def hash_adapter(files: Mapping[str, str]) -> str:
    """The same from the hashes of an adapter's two files."""
    return hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()


def _minus(stored: Tensor, base: Tensor) -> Tensor:
    return stored.to(base.dtype).sub_(base) if stored.dtype != base.dtype else stored - base
