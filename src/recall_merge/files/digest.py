"""The content of a model as one number, hashed while a merge reads or writes its tensors.

BLAKE3 over (name, dtype, shape, BLAKE3 of the bytes) of the tensors, sorted by name: independent of shards and of the order of reading.
SHA-256 would take four times as long, longer than all else in a merge. Source: https://github.com/BLAKE3-team/BLAKE3-specs
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from recall_merge.files.safetensors import TensorSpec, bytes_of

if TYPE_CHECKING:
    from torch import Tensor


class ModelDigest:
    """Collects the hashes of a model's tensors, from several threads."""

    def __init__(self) -> None:
        self.lines: dict[str, str] = {}  # by tensor name
        self._begun: dict[str, tuple[Any, int]] = {}  # of a tensor that comes in pieces: its hash so far, and where the next piece starts
        self._turn = threading.Condition()
        self._stopped = False

    def __reduce__(self) -> tuple[Any, ...]:
        return ModelDigest, ()  # a copy in another process starts empty; the lines collected there are merged by the caller

    def add(self, name: str, tensor: Tensor) -> None:
        self.lines[name] = _line(name, TensorSpec.of(tensor), hash_tensor(tensor))

    def add_piece(self, name: str, spec: TensorSpec, start: int, piece: Tensor) -> None:
        """Add the numbers of a tensor from `start` on. Pieces may come from several threads: each waits for those before it."""
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
        """End the waiting for pieces that will not come."""
        with self._turn:
            self._stopped = True
            self._turn.notify_all()

    def hexdigest(self, wanted: Callable[[str], bool] = lambda _: True) -> str:
        """The hash of all tensors, or of those that are wanted."""
        return blake3("\n".join(self.lines[name] for name in sorted(self.lines) if wanted(name)).encode()).hexdigest()


def hash_tensor(tensor: Tensor) -> str:
    """BLAKE3 of the bytes of a tensor."""
    return blake3(bytes_of(tensor)).hexdigest()


def _line(name: str, spec: TensorSpec, digest: str) -> str:
    return f"{name} {spec.torch_dtype} {spec.shape} {digest}"
