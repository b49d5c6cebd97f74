"""Whether files have changed since a plan was made, and whether another machine sees the same files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from recall_merge.runtime.errors import CheckpointError, Faults


@dataclass(frozen=True)
class FileStates:
    """Files with their device, inode, size and times of change: of the content, and of the inode, in nanoseconds."""

    files: Mapping[Path, tuple[int, int, int, int, int]]

    @classmethod
    def of(cls, paths: Iterable[Path]) -> FileStates:
        """The present states of these files, and of the files in these folders."""
        files = [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
        return cls({file: _state(file) for file in files if file.is_file()})

    def check(self) -> None:
        """Raises CheckpointError with every file that has changed: another file in its place, another size, another content since."""
        self._check(slice(0, 4), "the file changed while it was read", "wait until that is done, and run again")

    def check_elsewhere(self) -> None:
        """On another machine: raises CheckpointError with every file that is missing, or has another size or time of change."""
        fix = "models and samples must lie on a file system that all machines share, under the same path"
        self._check(slice(2, 4), "a machine of the cluster finds another file here, or none", fix)

    def _check(self, facts: slice, what: str, fix: str) -> None:
        faults = Faults()
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
