"""Hashes of files and models. `hash_model` covers all bytes of a model, and is remembered while its files are untouched.

A file counts as untouched while its device, inode, size and times of change (of content and inode, in nanoseconds) stay, and only if
it was older than two seconds when it was read, since a clock's tick may hide a change that follows at once. A disk that changes bytes
behind the file system goes unnoticed here; `recall verify` reads every byte each time.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from blake3 import blake3

from recall_merge.files.checkpoint import Checkpoint
from recall_merge.files.links import TEMPLATES
from recall_merge.files.safetensors import StoredTensor, TensorSpec, bytes_of
from recall_merge.runtime.durable import write_whole
from recall_merge.runtime.errors import CheckpointError, Faults
from recall_merge.runtime.parallel import cores, in_order

if TYPE_CHECKING:
    from torch import Tensor

FORM = 1  # of what is remembered
PIECE = 1 << 24  # bytes that are read at a time
SETTLED = 2.0  # seconds since the last change of a file after which its times show the next change
LOCAL_KEYS = ("_name_or_path",)  # keys of a config that say where a model was, not what it is


@dataclass(frozen=True)
class FileStates:
    """Files with their device, inode, size and times of change: of the content, and of the inode, in nanoseconds."""

    files: Mapping[Path, tuple[int, int, int, int, int]]

    @classmethod
    def of(cls, paths: Iterable[Path]) -> FileStates:
        """The present states of these files, and of the files in these folders and in their folders of chat templates."""
        files = [file for path in paths for file in (sorted([*path.iterdir(), *path.glob(f"{TEMPLATES}/*")]) if path.is_dir() else [path])]
        return cls({file: _state(file) for file in files if file.is_file()})

    def check(self, *, elsewhere: bool = False) -> None:
        """Raises CheckpointError with every file that is missing, or another one, or has another size or time of change.

        On another machine (`elsewhere`) the same file has another device and inode.
        """
        what, fix = "the file changed while it was read", "wait until that is done, and run again"
        if elsewhere:
            what = "a machine of the cluster finds another file here, or none"
            fix = "models and samples must lie on a file system that all machines share, under the same path"
        facts, faults = slice(2 if elsewhere else 0, None), Faults()  # subtle: the inode's time shows who sets back the content's
        for file, state in self.files.items():
            if _state(file)[facts] != state[facts]:
                faults.add(what, where=file, fix=fix)
        faults.raise_any(CheckpointError)


def _state(file: Path) -> tuple[int, int, int, int, int]:
    try:
        stat = file.stat()
    except OSError:
        return (0, 0, 0, 0, 0)
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def hash_file(path: Path) -> str:
    """SHA-256, as `sha256sum` and the hub compute it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_result(path: Path) -> str:
    """BLAKE3 of a file of a result, as `b3sum` computes it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, cast("Any", blake3)).hexdigest()


def hash_model(checkpoint: Checkpoint) -> str:
    """SHA-256 of a model: its weights, to the bit, and its config. The division into shards makes no difference.

    Raises CheckpointError if the weights are not downloaded, or change while they are read.
    """
    config = {key: value for key, value in checkpoint.config.items() if key not in LOCAL_KEYS}
    return hashlib.sha256(json.dumps([hash_weights(checkpoint), config], sort_keys=True).encode()).hexdigest()


def hash_weights(checkpoint: Checkpoint) -> str:
    """SHA-256 over names, dtypes, shapes and all bytes of a model's tensors."""
    from platformdirs import user_cache_path

    files = sorted({stored.file for stored in checkpoint.tensors.values()})
    before = FileStates.of(files)
    states = list(before.files.values())
    key = hashlib.sha256(json.dumps([FORM, sorted(checkpoint.tensors), states]).encode()).hexdigest()
    note = user_cache_path("recall-merge", appauthor=False) / "contents" / key
    with suppress(OSError, UnicodeDecodeError):
        if len(remembered := note.read_text("ascii")) == 64:
            return remembered
    started = time.time()
    digest = _read(checkpoint)
    if FileStates.of(files) != before:
        raise CheckpointError("the model's files changed while they were read", where=checkpoint.folder, fix="wait until that is done")
    if all(started - max(mtime, ctime) / 1e9 >= SETTLED for *_, mtime, ctime in states):
        with suppress(OSError):  # without the note, the model is read again
            write_whole(note, digest)
    return digest


def same_weights(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two checkpoints hold the same weights, to the bit; if one is still on the hub, judged by a few tensors."""
    if one.specs != other.specs:
        return False
    if not any(stored.remote for model in (one, other) for stored in model.tensors.values()):
        same_starts = all(stored.identity() == other.tensors[name].identity() for name, stored in one.tensors.items())
        return same_starts and hash_weights(one) == hash_weights(other)
    names = list(one.tensors)
    some = (names[0], names[len(names) // 2], names[-1])
    return one.fingerprint == other.fingerprint or all(one.tensors[name].same_bytes(other.tensors[name]) for name in some)


class ModelDigest:
    """The content of a model as one number, hashed while a merge reads or writes its tensors, from several threads.

    BLAKE3 over (name, dtype, shape, BLAKE3 of the bytes) of the tensors, sorted by name: independent of shards and of the order of reading.
    SHA-256 would take four times as long, longer than all else in a merge. Source: https://github.com/BLAKE3-team/BLAKE3-specs
    """

    def __init__(self) -> None:
        self.lines: dict[str, str] = {}  # by tensor name
        self._begun: dict[str, tuple[Any, int]] = {}  # of a tensor that comes in pieces: its hash so far, and where the next piece starts
        self._turn = threading.Condition()
        self._stopped = False

    def __reduce__(self) -> tuple[Any, ...]:
        return ModelDigest, ()  # a copy in another process starts empty; the lines collected there are merged by the caller

    def add(self, name: str, tensor: Tensor) -> None:
        self._end(name, TensorSpec.of(tensor), blake3(bytes_of(tensor)))

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
                self._end(name, spec, digest)
            self._turn.notify_all()

    def _end(self, name: str, spec: TensorSpec, digest: Any) -> None:
        self.lines[name] = f"{name} {spec.torch_dtype} {spec.shape} {digest.hexdigest()}"

    def stop(self) -> None:
        """End the waiting for pieces that will not come."""
        with self._turn:
            self._stopped = True
            self._turn.notify_all()

    def hexdigest(self, wanted: Callable[[str], bool] = lambda _: True) -> str:
        """The hash of all tensors, or of those that are wanted."""
        return blake3("\n".join(self.lines[name] for name in sorted(self.lines) if wanted(name)).encode()).hexdigest()


def _read(checkpoint: Checkpoint) -> str:
    """Tensor by tensor, in the order of their bytes, on as many threads as there are cores."""
    names = sorted(checkpoint.tensors, key=lambda name: (str(checkpoint.tensors[name].file), checkpoint.tensors[name].begin))
    hashes = dict(zip(names, in_order(lambda name: _hash(checkpoint.tensors[name]), names, cores()), strict=True))
    lines = (f"{name} {checkpoint.tensors[name].spec} {hashes[name]}" for name in sorted(names))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _hash(stored: StoredTensor) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(PIECE, stored.spec.nbytes)))
    for start in range(0, stored.spec.nbytes, PIECE):
        piece = buffer[: stored.spec.nbytes - start]
        stored.fill(piece, start)
        digest.update(piece)
    return digest.hexdigest()
