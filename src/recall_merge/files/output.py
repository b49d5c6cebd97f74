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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from recall_merge.files.checkpoint import INDEX, SINGLE
from recall_merge.files.ownership import Owned, claim, files_in, leftover, names_in, owned
from recall_merge.files.safetensors import TensorSpec, bytes_of, encode_header
from recall_merge.runtime.durable import sync
from recall_merge.runtime.errors import OutputError, short
from recall_merge.runtime.lock import take_lock
from recall_merge.runtime.paths import is_mount, path_of

if TYPE_CHECKING:
    from torch import Tensor

WORKSPACE = "workspace.json"  # in the folder of one
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

    Args:
        overwrite: replace a folder of this kind that recall-merge made; nothing else is ever replaced.
        kind: what the folder is.
    """

    def __init__(self, target: Path, *, overwrite: bool, kind: str = "model") -> None:
        self.target = Path(os.path.realpath(path_of(target)))  # a link is followed: its target is replaced, the link stays
        self.overwrite, self.kind = overwrite, kind
        self.path = self.target.parent / f"{self.target.name}.partial"
        self._old = self.target.parent / f"{self.target.name}.replaced.partial"  # where an old folder waits until the new one is there

    def check(self, protected: Mapping[str, Path]) -> None:
        """Raises OutputError if the folder cannot be written; writes nothing.

        `protected` is what the run reads: the target may neither be nor contain nor lie in any of it.
        """
        target = self.target
        if not target.name:
            raise OutputError("the output cannot be the root of the disk", where=target, fix=ELSEWHERE)
        for what, path in protected.items():
            read = Path(os.path.realpath(path))
            for place in (target, self.path, self._old):
                if read.is_relative_to(place) or place.is_relative_to(read):
                    raise OutputError(f"the output would lie in, or over, {what}", where=target, fix=ELSEWHERE)
        if is_mount(target):
            what = "the output folder is where a disk or volume is mounted, so no finished folder can be renamed into its place"
            raise OutputError(what, where=target, fix=f"give a folder in it, such as {target / 'merged'}")
        self._find_old()
        for folder in (self.path, self._old):
            if _is_foreign(folder):
                raise _not_ours(folder)
        parent = _existing(target.parent)
        if not os.access(parent, os.W_OK):
            raise OutputError("there is no permission to write here", where=parent, fix=ELSEWHERE)

    def __enter__(self) -> OutputFolder:
        try:
            self._lock = self._take()
        except OSError as error:
            raise _refused(error, self.target) from error
        try:
            self._refuse_unfinished()
            claim(self.path, self.kind)
            self._finish_replacement()
            self._find_old()  # again, now that no other process can finish here
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        with suppress(OSError):  # what cannot be removed from a broken disk is removed by the next attempt
            if _same(self.path, self._lock):
                Owned(self.path, self.kind).remove()
        os.close(self._lock)
        if isinstance(error, OSError):
            raise _refused(error, self.target) from error

    def _take(self) -> int:
        """Make the folder, or take over what a stopped run left of it, and lock it; the system releases the lock."""
        while True:
            if self.path.is_symlink():
                raise _not_ours(self.path)
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except FileExistsError:
                if os.path.lexists(self.path):
                    raise
                continue  # another process has just renamed it
            try:
                descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                continue
            try:
                if not take_lock(descriptor):
                    raise _in_use(self.target)
                if _same(self.path, descriptor):  # else another process has renamed it meanwhile
                    if (left := leftover(self.path)) is None:
                        raise _not_ours(self.path)
                    left.clear()
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _refuse_unfinished(self) -> None:
        """Raises OutputError while another process, whose folder is at the target by now, still has an old one to delete."""
        try:
            descriptor = os.open(self.target, os.O_RDONLY | os.O_DIRECTORY)
        except (FileNotFoundError, NotADirectoryError):
            return
        try:
            if not take_lock(descriptor):
                raise _in_use(self.target)
        finally:
            os.close(descriptor)

    def commit(self) -> tuple[str, ...]:
        """Rename the finished folder to its target. An old folder stays until the new one is there.    -> what a reader should know

        Raises OutputError if something came there meanwhile that is not to be replaced.
        """
        for file in files_in(self.path):
            sync(file)
        files = names_in(self.path)
        if not _same(self.path, self._lock):
            raise OutputError("the unfinished result was moved or removed meanwhile", where=self.path, fix="run the command again")
        claim(self.path, self.kind, files=files)
        if (old := self._find_old()) is not None:
            claim(self.target, old.kind, files=old.files)
            self.target.rename(self._old)
        try:
            self._put(self.path)
        except (OSError, OutputError):
            self._finish_replacement()
            raise
        claim(self.target, self.kind, whole=True, files=files)
        sync(self.target.parent)
        try:
            self._finish_replacement()
        except (OSError, OutputError) as error:
            return (f"the old folder could not be deleted, and still lies in {self._old}: {error}",)
        return ()

    def _find_old(self) -> Owned | None:
        """What stands at the target and is to be replaced, if anything does. Raises OutputError if it is not to be replaced."""
        target, fault = self.target, partial(OutputError, where=self.target)
        if not os.path.lexists(target):
            return None
        if not target.is_dir():
            raise fault("a file has the name of the output folder", fix=ELSEWHERE)
        if not any(target.iterdir()):
            return None
        if not self.overwrite:
            raise fault("the output folder is not empty", fix="choose another, or give --overwrite to replace it")
        ours = owned(target)
        if ours is None or ours.files is None or ours.kind != self.kind:
            what = f"the output folder is no {self.kind} that recall-merge made, and is not replaced"
            raise fault(what, fix=f"{ELSEWHERE}, or delete it yourself")
        if others := ours.others():
            names = ", ".join(map(short, others[:3])) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
            raise fault(f"the output folder also holds {names}, and is not replaced", fix=f"move that away, or {ELSEWHERE}")
        return ours

    def _put(self, folder: Path) -> None:
        """Rename a folder to the target. Subtle: the system never replaces a folder that is not empty."""
        try:
            folder.rename(self.target)
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
                raise
            what, fix = "something else came to stand where the result is to be", f"move it away, or {ELSEWHERE}"
            raise OutputError(what, where=self.target, fix=fix) from error

    def _finish_replacement(self) -> None:
        """After a replacement that was stopped: the old folder goes back if there is no new one, and is removed if there is."""
        if not os.path.lexists(self._old):
            return
        if (old := leftover(self._old)) is None:
            raise _not_ours(self._old)
        if owned(self.target) is not None or old.files is None:
            old.remove()
        else:
            self._put(self._old)  # fails if something else stands there by now: then both stay
            claim(self.target, old.kind, whole=True, files=old.files)


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
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _is_foreign(folder: Path) -> bool:
    """Whether something lies there that is not ours. What another process takes away meanwhile is not there."""
    with suppress(FileNotFoundError):
        if leftover(folder) is not None:
            return False
    return os.path.lexists(folder)


def _in_use(target: Path) -> OutputError:
    fix = "wait until it has ended, or choose another folder for `out`"
    return OutputError("another process is writing this result", where=target, fix=fix)


def _not_ours(folder: Path) -> OutputError:
    return OutputError("a folder that is not ours lies where the result is to be built", where=folder, fix="move it away")


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.exists())
