"""What tells one state of a model from every other: a hash of all of its bytes, remembered for as long as its files are untouched.

A file counts as untouched while its device, inode, size, and times of change (of content and of inode, to the nanosecond) are the same, and
only if it was older than two seconds when it was read, since a clock's tick may hide a change that follows at once. What a disk changes by
itself, behind the file system's back, such times do not tell: `recall verify` reads every byte each time that it is asked.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from recall_merge.files.checkpoint import Checkpoint
from recall_merge.files.durable import write_whole
from recall_merge.files.safetensors import Stored
from recall_merge.runtime.errors import CheckpointError, Faults
from recall_merge.runtime.parallel import cores, in_order

FORM = 1  # of what is remembered
PIECE = 1 << 24  # bytes that are read at a time
SETTLED = 2.0  # seconds since the last change of a file from which its times tell of the next one
NOT_OURS = ("_name_or_path",)  # keys of a config that say where a model lay, not what it is


def content_of(checkpoint: Checkpoint) -> str:
    """SHA-256 of a model: its weights, to the bit, and its config. How the tensors lie in shards makes no difference.

    Raises:
        CheckpointError: if the weights are not downloaded, or change while they are read.
    """
    config = {key: value for key, value in checkpoint.config.items() if key not in NOT_OURS}
    return hashlib.sha256(json.dumps([weights_of(checkpoint), config], sort_keys=True).encode()).hexdigest()


def weights_of(checkpoint: Checkpoint) -> str:
    """SHA-256 over names, dtypes, shapes and all bytes of a model's tensors."""
    before = _files(checkpoint)
    note = _memory() / hashlib.sha256(json.dumps([FORM, sorted(checkpoint.tensors), before]).encode()).hexdigest()
    with suppress(OSError, UnicodeDecodeError):
        if len(known := note.read_text("ascii")) == 64:
            return known
    started = time.time()
    found = _read(checkpoint)
    if _files(checkpoint) != before:
        raise CheckpointError("the model's files changed while they were read", where=checkpoint.folder, fix="wait until that is done")
    if all(started - max(mtime, ctime) / 1e9 >= SETTLED for _, _, _, mtime, ctime in before):
        with suppress(OSError):  # what cannot be remembered is read again
            write_whole(note, found)
    return found


def same_weights(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two checkpoints hold the same weights, to the bit; where one is still on the hub, by a look at a few tensors."""
    if not any(stored.remote for model in (one, other) for stored in model.tensors.values()):
        if one.specs != other.specs:
            return False
        similarity_rows = all(stored.identity() == other.tensors[name].identity() for name, stored in one.tensors.items())
        return similarity_rows and weights_of(one) == weights_of(other)
    if one.fingerprint == other.fingerprint:
        return True
    if one.specs != other.specs:
        return False
    names = list(one.tensors)
    return all(one.tensors[name].same_bytes(other.tensors[name]) for name in (names[0], names[len(names) // 2], names[-1]))


@dataclass(frozen=True)
class Watch:
    """The files of some folders, and single ones, as they were."""

    files: Mapping[Path, tuple[int, int, int, int]]

    def check(self) -> None:
        """Refuse what was read meanwhile if it is not what it was: another file in its place, another size, another time of change.

        Raises:
            CheckpointError: with every file that changed.
        """
        faults = Faults()
        for file, state in self.files.items():
            if _state(file) != state:
                faults.add("the file changed while it was read", where=file, fix="wait until that is done, and run again")
        faults.raise_any(CheckpointError)

    def check_elsewhere(self) -> None:
        """Refuse, on another machine than the one that looked first, what is not of the same size and time of change there.

        Raises:
            CheckpointError: with every file that is another, or missing.
        """
        faults = Faults()
        for file, (_, _, *state) in self.files.items():
            if [*_state(file)[2:]] != state:
                fix = "models and samples must lie on a file system that all machines share, under the same path"
                faults.add("a machine of the cluster finds another file here, or none", where=file, fix=fix)
        faults.raise_any(CheckpointError)


def watch(places: Iterable[Path]) -> Watch:
    """Remember how the files of these folders, and these files, are now."""
    files = [file for place in places for file in (sorted(place.iterdir()) if place.is_dir() else [place])]
    return Watch({file: _state(file) for file in files if file.is_file()})


def _state(file: Path) -> tuple[int, int, int, int]:
    try:
        found = file.stat()
    except OSError:
        return (0, 0, 0, 0)
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _read(checkpoint: Checkpoint) -> str:
    """Tensor by tensor, in the order of their bytes, on as many threads as there are cores."""
    names = sorted(checkpoint.tensors, key=lambda name: (str(checkpoint.tensors[name].file), checkpoint.tensors[name].begin))
    hashes = dict(zip(names, in_order(lambda name: _hash(checkpoint.tensors[name]), names, cores()), strict=True))
    lines = (f"{name} {checkpoint.tensors[name].spec} {hashes[name]}" for name in sorted(names))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _hash(stored: Stored) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(PIECE, stored.spec.nbytes)))
    for start in range(0, stored.spec.nbytes, PIECE):
        piece = buffer[: stored.spec.nbytes - start]
        stored.fill(piece, start)
        digest.update(piece)
    return digest.hexdigest()


def _files(checkpoint: Checkpoint) -> list[tuple[int, int, int, int, int]]:
    """What the file system says of the weight files."""
    found = [file.stat() for file in sorted({stored.file for stored in checkpoint.tensors.values()})]
    return [(one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns) for one in found]


def _memory() -> Path:
    """The user's cache folder."""
    from platformdirs import user_cache_path

    return user_cache_path("recall-merge", appauthor=False) / "contents"
