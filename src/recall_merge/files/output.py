"""A result folder: written beside its target as `.partial`, and renamed in one step when complete, or removed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from recall_merge.files.checkpoint import INDEX, SINGLE
from recall_merge.files.durable import sync
from recall_merge.files.lock import take_lock
from recall_merge.files.record import RECORD
from recall_merge.files.safetensors import TensorSpec, bytes_of, encode_header
from recall_merge.runtime.errors import OutputError
from recall_merge.runtime.paths import path_of

if TYPE_CHECKING:
    from torch import Tensor

WORKSPACE = "workspace.json"  # in the folder of one
MARKER = ".recall-unfinished"  # tells our leftovers from a user's folder
ELSEWHERE = "choose another folder for `out`"


@dataclass(frozen=True)
class Shard:
    """One weight file of a model: its name, and its tensors in order."""

    file: str
    specs: Mapping[str, TensorSpec]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())


def plan_shards(specs: Mapping[str, TensorSpec], shard_size: int) -> list[Shard]:
    """Fill shards in the given order, up to `shard_size` bytes each; a larger tensor gets a shard of its own.

    >>> [shard.file for shard in plan_shards({"a": TensorSpec("F32", (2,)), "b": TensorSpec("F32", (2,))}, shard_size=8)]
    ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    groups: list[dict[str, TensorSpec]] = [{}]
    filled = 0
    for name, spec in specs.items():
        if groups[-1] and filled + spec.nbytes > shard_size:
            groups.append({})
            filled = 0
        groups[-1][name] = spec
        filled += spec.nbytes
    if len(groups) == 1:
        return [Shard(SINGLE, groups[0])]
    return [Shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, start=1)]


def beside(result: Path, suffix: str) -> Path:
    """Where something made from a result goes: beside its folder; for a merge of a workspace, beside the workspace."""
    place = result.absolute()
    home = place.parent.parent
    return home.with_name(f"{home.name}-{place.name}{suffix}") if (home / WORKSPACE).is_file() else place.with_name(place.name + suffix)


class OutputFolder:
    """A folder that is being written. Use as a context: on an exception it is removed, and nothing else is touched.

    >>> with OutputFolder(Path("merged"), overwrite=False) as folder:      # doctest: +SKIP
    ...     (folder.path / "config.json").write_text("{}")
    ...     folder.commit()
    """

    def __init__(self, target: Path, *, overwrite: bool) -> None:
        self.target = path_of(target).resolve()  # a link is followed: its target is replaced, the link stays
        self.overwrite = overwrite
        self.path = self.target.parent / f"{self.target.name}.partial"
        self._old = self.target.parent / f"{self.target.name}.replaced.partial"  # where an old folder waits until the new one is there

    def check(self, protected: Mapping[str, Path]) -> None:
        """Raises OutputError if the folder cannot be written; writes nothing.

        `protected` are folders that the run reads: the target may neither be nor contain nor lie in one of them.
        """
        target = self.target
        if not target.name:
            raise OutputError("the output cannot be the root of the disk", where=target, fix=ELSEWHERE)
        for what, folder in protected.items():
            if folder.resolve().is_relative_to(target) or target.is_relative_to(folder.resolve()):
                raise OutputError(f"the output would lie in, or over, {what}", where=target, fix=ELSEWHERE)
        if target.exists() and not target.is_dir():
            raise OutputError("a file has the name of the output folder", where=target, fix=ELSEWHERE)
        if target.is_dir() and any(target.iterdir()):
            if not self.overwrite:
                raise OutputError("the output folder is not empty", where=target, fix="choose another, or give --overwrite to replace it")
            if not (target / "config.json").exists():
                raise OutputError("the output folder does not hold a model; --overwrite replaces models only", where=target, fix=ELSEWHERE)
        for folder in (self.path, self._old):
            if folder.exists() and not _is_ours(folder):
                raise _not_ours(folder)
        parent = _existing(target.parent)
        if not os.access(parent, os.W_OK):
            raise OutputError("there is no permission to write here", where=parent, fix=ELSEWHERE)

    def __enter__(self) -> OutputFolder:
        try:
            self._lock = self._take()
            self._finish_replacement()
            (self.path / MARKER).touch()
            for left in self.path.iterdir():
                if left.is_dir():
                    shutil.rmtree(left)
                elif left.name != MARKER:
                    left.unlink()
        except OSError as error:
            raise _refused(error, self.target) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        with suppress(OSError):  # what cannot be removed from a broken disk is removed by the next attempt
            if _same(self.path, self._lock):
                shutil.rmtree(self.path)
        os.close(self._lock)
        if isinstance(error, OSError):
            raise _refused(error, self.target) from error

    def _take(self) -> int:
        """Make the folder, or take over what a stopped run left of it, and lock it; the system releases the lock."""
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            if not take_lock(descriptor):
                os.close(descriptor)
                fix = "wait until it has ended, or choose another folder for `out`"
                raise OutputError("another process is writing this result", where=self.target, fix=fix)
            if _same(self.path, descriptor):  # else another process has renamed it meanwhile
                if _is_ours(self.path):
                    return descriptor
                os.close(descriptor)
                raise _not_ours(self.path)
            os.close(descriptor)

    def commit(self) -> None:
        """Rename the finished folder to its target. An old folder stays until the new one is there."""
        (self.path / MARKER).unlink()
        for file in self.path.iterdir():
            sync(file)
        sync(self.path)
        if self.target.exists():
            (self.target / MARKER).touch()
            self.target.rename(self._old)
        try:
            self.path.rename(self.target)
        except OSError:
            self._finish_replacement()
            raise
        sync(self.target.parent)
        if self._old.exists():
            shutil.rmtree(self._old)

    def _finish_replacement(self) -> None:
        """After a replacement that was stopped: the old folder goes back if there is no new one, and is removed if there is."""
        if not self._old.exists():
            return
        if self.target.exists():
            shutil.rmtree(self._old)
        else:
            self._old.rename(self.target)
            (self.target / MARKER).unlink(missing_ok=True)


class WeightWriter:
    """A context that writes the planned tensors, in the planned order, to the shards, and hashes each file (BLAKE3) on the way."""

    def __init__(self, folder: Path, shards: list[Shard]) -> None:
        self.hashes: dict[str, str] = {}
        self._folder = folder
        self._shards = iter(shards)
        self._expected: deque[tuple[str, TensorSpec]] = deque()
        self._pieces = 0  # numbers of the next tensor that were added in pieces
        self._file = None
        self._digest = blake3()
        if len(shards) > 1:
            total = sum(shard.nbytes for shard in shards)
            index = {"metadata": {"total_size": total}, "weight_map": {name: shard.file for shard in shards for name in shard.specs}}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def add(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor. It must be the next one of the plan, in the planned dtype and shape."""
        wanted, spec = self._next()
        if tuple(tensor.shape) != spec.shape or self._pieces:
            raise AssertionError(f"the plan expects {wanted} {spec}, got {name} {tensor.dtype} {tuple(tensor.shape)}")
        self.add_piece(name, tensor)

    def add_piece(self, name: str, piece: Tensor) -> None:
        """Append the next numbers of the next tensor, in the planned dtype; the tensor ends with the last of its numbers."""
        wanted, spec = self._next()
        self._pieces += piece.numel()
        if (name, piece.dtype) != (wanted, spec.torch_dtype) or self._pieces > spec.numel:
            raise AssertionError(f"the plan expects {wanted} {spec}, got {piece.numel()} more numbers of {name} {piece.dtype}")
        if piece.numel():
            self._write(bytes_of(piece))
        if self._pieces == spec.numel:
            self._pieces = 0
            self._expected.popleft()
            if not self._expected and self._file is not None:
                self.hashes[Path(self._file.name).name] = self._digest.hexdigest()
                self._file.close()

    def __enter__(self) -> WeightWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def _next(self) -> tuple[str, TensorSpec]:
        """The next tensor of the plan; with the first of a shard, its file is begun."""
        if not self._expected:
            shard = next(self._shards)
            self._expected = deque(shard.specs.items())
            self._file = (self._folder / shard.file).open("wb", buffering=0)
            self._digest = blake3()
            self._write(memoryview(encode_header(shard.specs)))
        return self._expected[0]

    def _write(self, data: memoryview) -> None:
        assert self._file is not None
        self._digest.update(data)
        while data:
            data = data[self._file.write(data) :]


def free_bytes(target: Path) -> int:
    """Free bytes on the disk where a folder will be."""
    return shutil.disk_usage(_existing(target.absolute().parent)).free


def _refused(error: OSError, target: Path) -> OutputError:
    full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    fix = "make room, or choose another disk; nothing is left of this attempt" if full else ELSEWHERE
    return OutputError(f"the result cannot be written: {error.strerror or error}", where=error.filename or target, fix=fix)


def _same(path: Path, descriptor: int) -> bool:
    """Whether a path is still the folder that is open."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _is_ours(partial: Path) -> bool:
    """Whether a stopped run left this folder: before it had the marker, with it, or after the record replaced it."""
    return partial.is_dir() and (not any(partial.iterdir()) or any((partial / name).exists() for name in (MARKER, RECORD)))


def _not_ours(folder: Path) -> OutputError:
    return OutputError("a folder that is not ours lies where the result is to be built", where=folder, fix="move it away")


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.exists())
