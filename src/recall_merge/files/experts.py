"""An expert as the merge sees it: for each tensor of the base, what it changed there. One face for checkpoints and adapters."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from blake3 import blake3

from recall_merge.files.adapter import CONFIG, WEIGHTS, Adapter
from recall_merge.files.checkpoint import Checkpoint
from recall_merge.files.hashing import content_of, same_weights
from recall_merge.files.safetensors import Spec, bytes_of
from recall_merge.runtime.errors import CheckpointError, Faults

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from recall_merge.maths.deltas import Delta


class Digest:
    """The content of a model as one number: BLAKE3 over (name, dtype, shape, BLAKE3 of the bytes) of its tensors, by name.

    It does not depend on how the tensors lie in shards, nor on the order in which they are read. A merge hashes all that it reads: SHA-256
    would take four times as long, longer than everything else. Source: https://github.com/BLAKE3-team/BLAKE3-specs
    """

    def __init__(self) -> None:
        self.lines: dict[str, str] = {}  # of each tensor, by its name
        self._begun: dict[str, tuple[Any, int]] = {}  # of a tensor that comes in pieces: its hash so far, and where the next one begins
        self._turn = threading.Condition()
        self._stopped = False

    def __reduce__(self) -> tuple[Any, ...]:
        return Digest, ()  # a copy in another process begins anew: what it reads there comes back as lines

    def add(self, name: str, tensor: Tensor) -> None:
        self.lines[name] = _line(name, Spec.of(tensor), hash_tensor(tensor))

    def add_piece(self, name: str, spec: Spec, start: int, piece: Tensor) -> None:
        """The numbers of a tensor from `start` on. Pieces may come from several threads: each waits until those before it have come."""
        with self._turn:
            self._turn.wait_for(lambda: self._stopped or self._begun.get(name, (None, 0))[1] == start)
            if self._stopped:
                raise RuntimeError("a piece before this one was not read")
            digest = self._begun[name][0] if start else blake3()
        digest.update(bytes_of(piece))
        stop = start + piece.numel()
        with self._turn:
            self._begun[name] = digest, stop
            if stop == spec.numel:
                del self._begun[name]
                self.lines[name] = _line(name, spec, digest.hexdigest())
            self._turn.notify_all()

    def stop(self) -> None:
        """Let nobody wait for a piece that will not come."""
        with self._turn:
            self._stopped = True
            self._turn.notify_all()

    def hexdigest(self, wanted: Callable[[str], bool] = lambda _: True) -> str:
        """Of all tensors, or of those that are wanted."""
        return blake3("\n".join(self.lines[name] for name in sorted(self.lines) if wanted(name)).encode()).hexdigest()


class Expert(Protocol):
    """What a merge needs to know of an expert. Tensors are float32 or better, in the names and shapes of the base."""

    @property
    def name(self) -> str: ...

    @property
    def folder(self) -> Path: ...

    @property
    def nbytes(self) -> int:
        """Bytes that reading it once takes."""
        ...

    @property
    def tensors(self) -> Iterable[str]:
        """Names of the tensors that it has, or changes."""
        ...

    def spec(self, name: str) -> Spec | None:
        """Its own version of a tensor; None where it has the base's."""
        ...

    def comes_in_pieces(self, name: str) -> bool:
        """Whether `delta` can tell of a part of this tensor without the rest of it."""
        ...

    def delta(self, name: str, base: Tensor, span: range | None = None) -> Delta | None:
        """What it adds to `base`, (*s); None where it changes nothing. With a span, `base` and result are those numbers of the tensor."""
        ...

    def own(self, name: str, base: Tensor) -> Tensor:
        """Its own tensor, which for token tensors may have other rows than `base`."""
        ...

    def hashes(self) -> dict[str, str]:
        """What it consisted of, for the record."""
        ...


@dataclass(frozen=True)
class FullExpert:
    """An expert that is a whole checkpoint."""

    name: str
    checkpoint: Checkpoint
    digest: Digest = field(default_factory=Digest, compare=False, repr=False)

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    @property
    def nbytes(self) -> int:
        return self.checkpoint.nbytes

    @property
    def tensors(self) -> Iterable[str]:
        return self.checkpoint.tensors

    def spec(self, name: str) -> Spec | None:
        return self.checkpoint.tensors[name].spec

    def comes_in_pieces(self, name: str) -> bool:
        return True

    def delta(self, name: str, base: Tensor, span: range | None = None) -> Delta | None:
        stored = self.checkpoint.read(name, span)
        if span:
            self.digest.add_piece(name, self.checkpoint.tensors[name].spec, span.start, stored)
        else:
            self.digest.add(name, stored)
        return _minus(stored, base)

    def read_delta(self, name: str, base: Tensor, span: range) -> Tensor:
        """A span of its delta, of which the digest is not told: for a look before the pass that reads it."""
        return _minus(self.checkpoint.read(name, span), base)

    def own(self, name: str, base: Tensor) -> Tensor:
        return self.checkpoint.read(name).to(base.dtype)

    def hashes(self) -> dict[str, str]:
        return {"tensors": self.digest.hexdigest()}


@dataclass(frozen=True)
class AdapterExpert:
    """An expert that is an adapter on the base."""

    name: str
    adapter: Adapter

    @property
    def folder(self) -> Path:
        return self.adapter.folder

    @property
    def nbytes(self) -> int:
        return self.adapter.nbytes

    @property
    def tensors(self) -> Iterable[str]:
        return self.adapter.edits

    def spec(self, name: str) -> Spec | None:
        edit = self.adapter.edits.get(name)
        return edit.replace.spec if edit and edit.replace else None

    def comes_in_pieces(self, name: str) -> bool:
        return name not in self.adapter.edits

    def delta(self, name: str, base: Tensor, span: range | None = None) -> Delta | None:
        edit = self.adapter.edits.get(name)
        return edit.delta(base) if edit else None

    def own(self, name: str, base: Tensor) -> Tensor:
        edit = self.adapter.edits.get(name)
        return edit.apply(base) if edit else base

    def hashes(self) -> dict[str, str]:
        return {file: hash_file(self.folder / file) for file in (CONFIG, WEIGHTS)}


@dataclass(frozen=True)
class BaseExpert:
    """The base as one of the models: it changes nothing, so it is not read again."""

    base: Checkpoint
    name: str = "base"

    @property
    def folder(self) -> Path:
        return self.base.folder

    @property
    def nbytes(self) -> int:
        return 0

    @property
    def tensors(self) -> Iterable[str]:
        return ()

    def spec(self, name: str) -> Spec | None:
        return None

    def comes_in_pieces(self, name: str) -> bool:
        return True

    def delta(self, name: str, base: Tensor, span: range | None = None) -> Delta | None:
        return None

    def own(self, name: str, base: Tensor) -> Tensor:
        return base

    def hashes(self) -> dict[str, str]:
        return {}


HARMLESS = {  # settings of a config that may differ from the base's without changing what the weights mean
    "_attn_implementation_autoset", "_name_or_path", "architectures", "attention_dropout", "attn_pdrop", "auto_map", "bos_token_id",
    "dtype", "embd_pdrop", "eos_token_id", "hidden_dropout", "hidden_dropout_prob", "initializer_range", "max_length",
    "output_router_logits", "pad_token_id", "resid_pdrop", "router_aux_loss_coef", "task_specific_params", "tokenizer_class",
    "torch_dtype", "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache", "vocab_size",
}  # fmt: skip


def check_checkpoint(
    name: str, expert: Checkpoint, base: Checkpoint, skipped: Callable[[str], bool] = lambda _: False, *, is_base: bool = False
) -> None:
    """Check that a checkpoint is of the base's architecture, tensor by tensor; token tensors may differ in their rows.

    `skipped` tells the tensors that the run does not merge: an expert may lack them, or have them otherwise. `is_base` says that it is
    the base, listed on purpose.

    Raises:
        CheckpointError: with every difference (the first few of each kind).
    """
    faults = Faults()
    where, config = expert.folder, expert.folder / "config.json"
    if (expert.folder.resolve() == base.folder.resolve() or same_weights(expert, base)) != is_base:
        what = f"expert '{name}' is not the base, though `is_base` says so" if is_base else f"expert '{name}' is the base itself"
        fix = "leave `is_base` out" if is_base else "list only models that were fine-tuned from the base, or say `is_base: true`"
        raise CheckpointError(what, where=where, fix=fix)
    theirs_all, ours_all = ({t for t in model.tensors if not skipped(t)} for model in (expert, base))
    different = _differences(expert.config, base.config)
    for key, (theirs, ours) in list(different.items())[:8]:
        fix = "experts must be fine-tuned from the base, with the same architecture"
        faults.add(f"expert '{name}' has {key} {theirs!r}; the base has {ours!r}", where=config, fix=fix)
    fix = "fine-tune it from this base, or name the tensor under `skip:` to keep the base's"
    for kind, names in (("lacks", ours_all - theirs_all), ("has the extra", theirs_all - ours_all)):
        for tensor in sorted(names)[:3]:
            faults.add(f"expert '{name}' {kind} tensor '{tensor}'" + _more(names), where=where, fix=fix)
    shared = sorted(theirs_all & ours_all)
    rows = set(base.token_tensors) & set(expert.token_tensors)
    shapes = {t: (expert.tensors[t].spec, base.tensors[t].spec) for t in shared}
    wrong = [t for t, (theirs, ours) in shapes.items() if theirs.shape[t in rows :] != ours.shape[t in rows :]]
    for tensor in wrong[:3]:
        theirs, ours = shapes[tensor]
        what = f"expert '{name}' has '{tensor}' of shape {theirs.shape}; the base has {ours.shape}" + _more(wrong)
        faults.add(what, where=expert.tensors[tensor].file, fix=fix)
    faults.raise_any(CheckpointError)


def own_tensors(expert: Expert, base: Checkpoint, merges: Callable[[str], bool]) -> dict[str, Tensor]:
    """A whole model of the expert, in float32, under the base's names: what its forward pass is made from.

    `merges` tells the tensors that are the expert's own; the others are the base's, as in the result.
    """

    def own(name: str) -> Tensor:
        tensor = own_tensor(expert, base, name, merges)
        return widen(tensor) if merges(name) else tensor

    return {name: own(name) for name in base.tensors}


def own_tensor(expert: Expert, base: Checkpoint, name: str, merges: Callable[[str], bool]) -> Tensor:
    """One tensor of `own_tensors`; in its own dtype where that is as good."""
    if not merges(name):
        return base.read(name)
    if isinstance(expert, FullExpert):
        return expert.checkpoint.read(name)
    stored = base.read(name)
    return stored if expert.comes_in_pieces(name) else expert.own(name, widen(stored))


def own_rows(
    expert: Expert, base: Checkpoint, name: str, rows: Iterable[int], merges: Callable[[str], bool], *, dtype: torch.dtype
) -> Tensor:
    """A tensor of which only some rows are read; the others are 0, and take no memory where nobody touches them.

    Args:
        dtype: that it is used in: to convert it would be to touch all of it.
    """
    from recall_merge.runtime.memory import zeros

    source = expert.checkpoint if isinstance(expert, FullExpert) and merges(name) else base
    spec = source.tensors[name].spec
    tensor = zeros(spec.shape, dtype)
    width = spec.numel // max(1, spec.shape[0])
    for row in rows:
        tensor[row] = source.read(name, range(row * width, (row + 1) * width)).view(tensor.shape[1:])
    return tensor


def widen(tensor: Tensor) -> Tensor:
    """In float32, or in its own dtype where that is better."""
    import torch

    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def hash_expert(expert: Expert) -> str:
    """Tells one state of an expert from every other: SHA-256 of an adapter's files, or of a checkpoint's weights and config."""
    if isinstance(expert, FullExpert | BaseExpert):
        return content_of(expert.checkpoint if isinstance(expert, FullExpert) else expert.base)
    return hashlib.sha256(repr(sorted(expert.hashes().items())).encode()).hexdigest()


def _minus(stored: Tensor, base: Tensor) -> Tensor:
    return stored.to(base.dtype).sub_(base) if stored.dtype != base.dtype else stored - base


def hash_tensor(tensor: Tensor) -> str:
    """BLAKE3 of the bytes of a tensor."""
    return blake3(bytes_of(tensor)).hexdigest()


def hash_result(path: Path) -> str:
    """BLAKE3 of a file of a result, as `b3sum` tells it."""
    digest = blake3()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256, as `sha256sum` and the hub tell it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _differences(expert: Mapping[str, Any], base: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Settings that differ; one that either config leaves out is at its default, and the weights' shapes speak for it."""
    found: dict[str, tuple[Any, Any]] = {}
    for key, ours in base.items():
        theirs = expert.get(key)
        if key in HARMLESS or ours is None or theirs is None or ours == theirs:
            continue
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            found |= _differences(theirs, ours, f"{prefix}{key}.")
        else:
            found[prefix + key] = (theirs, ours)
    return found


def _line(name: str, spec: Spec, digest: str) -> str:
    return f"{name} {spec.torch_dtype} {spec.shape} {digest}"


def _more(names: Any) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
