"""Hashes of files and models. A model's hash covers all of its bytes, and is remembered while its files are untouched.

A file counts as untouched while its device, inode, size and times of change (of content and inode, in nanoseconds) stay, and only if
it was older than two seconds when it was read, since a clock's tick may hide a change that follows at once. A disk that changes bytes
behind the file system goes unnoticed here; `recall verify` reads every byte each time.
"""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import suppress
from pathlib import Path

from blake3 import blake3

from recall_merge.files.checkpoint import Checkpoint
from recall_merge.files.durable import write_whole
from recall_merge.files.safetensors import StoredTensor
from recall_merge.runtime.errors import CheckpointError
from recall_merge.runtime.parallel import cores, in_order

FORM = 1  # of what is remembered
PIECE = 1 << 24  # bytes that are read at a time
SETTLED = 2.0  # seconds since the last change of a file after which its times show the next change
LOCAL_KEYS = ("_name_or_path",)  # keys of a config that say where a model was, not what it is


def hash_file(path: Path) -> str:
    """SHA-256, as `sha256sum` and the hub compute it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_result(path: Path) -> str:
    """BLAKE3 of a file of a result, as `b3sum` computes it."""
    digest = blake3()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def hash_model(checkpoint: Checkpoint) -> str:
    """SHA-256 of a model: its weights, to the bit, and its config. The division into shards makes no difference.

    Raises CheckpointError if the weights are not downloaded, or change while they are read.
    """
    config = {key: value for key, value in checkpoint.config.items() if key not in LOCAL_KEYS}
    return hashlib.sha256(json.dumps([hash_weights(checkpoint), config], sort_keys=True).encode()).hexdigest()


def hash_weights(checkpoint: Checkpoint) -> str:
    """SHA-256 over names, dtypes, shapes and all bytes of a model's tensors."""
    from platformdirs import user_cache_path

    before = _stats(checkpoint)
    key = hashlib.sha256(json.dumps([FORM, sorted(checkpoint.tensors), before]).encode()).hexdigest()
    note = user_cache_path("recall-merge", appauthor=False) / "contents" / key
    with suppress(OSError, UnicodeDecodeError):
        if len(remembered := note.read_text("ascii")) == 64:
            return remembered
    started = time.time()
    digest = _read(checkpoint)
    if _stats(checkpoint) != before:
        raise CheckpointError("the model's files changed while they were read", where=checkpoint.folder, fix="wait until that is done")
    if all(started - max(mtime, ctime) / 1e9 >= SETTLED for _, _, _, mtime, ctime in before):
        with suppress(OSError):  # without the note, the model is read again
            write_whole(note, digest)
    return digest


def same_weights(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two checkpoints hold the same weights, to the bit; if one is still on the hub, judged by a few tensors."""
    if not any(stored.remote for model in (one, other) for stored in model.tensors.values()):
        if one.specs != other.specs:
            return False
        same_starts = all(stored.identity() == other.tensors[name].identity() for name, stored in one.tensors.items())
        return same_starts and hash_weights(one) == hash_weights(other)
    if one.fingerprint == other.fingerprint:
        return True
    if one.specs != other.specs:
        return False
    names = list(one.tensors)
    return all(one.tensors[name].same_bytes(other.tensors[name]) for name in (names[0], names[len(names) // 2], names[-1]))


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


def _stats(checkpoint: Checkpoint) -> list[tuple[int, int, int, int, int]]:
    """What the file system says about the weight files."""
    stats = [file.stat() for file in sorted({stored.file for stored in checkpoint.tensors.values()})]
    return [(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats]
