"""`record.json`: what a result was made from, and how; and the check that the result still matches it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from recall_merge.files.hashing import hash_result
from recall_merge.files.links import TEMPLATES
from recall_merge.runtime.errors import CheckpointError, Faults, ResultError, short
from recall_merge.runtime.sealed import read_sealed, sealed

RECORD = "record.json"
FORMAT = 3
OLDER = 2  # without a hash of itself, and of no file below the folder
READ_BY_LOADERS = {".safetensors", ".json", ".jinja", ".txt", ".model", ".py", ".bin", ".pt", ".pth", ".ckpt"}
# files that may be added or changed after the record: people edit model cards, and `recall stats` writes beside experts
LATER = (RECORD, "README.md", "stats.json", "stats.safetensors")
PACKAGES = ("recall-merge", "torch", "transformers", "safetensors", "huggingface_hub", "peft", "scikit-learn", "numpy", "tokenizers")


def versions() -> dict[str, str]:
    """Versions of Python, the machine type and the packages that a result depends on."""
    installed = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            installed[package] = version(package)
    return installed


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the record, with BLAKE3 of all other files of the folder; hashes under `files` are taken as they are, to spare reading."""
    hashed = record.get("files", {})
    files = {name: hashed.get(name) or hash_result(folder / name) for name in _names(folder)}
    (folder / RECORD).write_text(sealed({"format": FORMAT, **record, "files": files}, indent=2), "utf-8")


def read_record(folder: Path) -> dict[str, Any]:
    """The record in a folder. Raises ResultError if there is none, or it has changed, or is in an unknown format."""
    try:
        record = read_sealed(folder / RECORD, since=FORMAT, again="merge again, or restore it") if (folder / RECORD).exists() else None
    except CheckpointError as error:
        raise ResultError(error.faults) from error
    if record is None or record.get("format") not in (OLDER, FORMAT) or not isinstance(record.get("files"), dict):
        what = f"there is no {RECORD}" if record is None else f"{RECORD} is in a format that this version does not know"
        raise ResultError(what, where=folder, fix="give the folder of a result of `recall merge`")
    return record


def is_read_by_loaders(name: str) -> bool:
    """Whether loaders may take a file of this name, relative to a model's folder, for a part of the model."""
    return Path(name).suffix in READ_BY_LOADERS and not name.startswith(".") and "/" not in name.removeprefix(f"{TEMPLATES}/")


def verify_files(folder: Path) -> dict[str, Any]:
    """The record of a result whose files match it. Raises ResultError with every file that is missing, changed, or new."""
    record = read_record(folder)
    faults = Faults()
    for name, wanted in record["files"].items():
        file = folder / name
        if name in LATER:
            continue
        if Path(name).name != name.removeprefix(f"{TEMPLATES}/") or len(name) > 255 or "\0" in name:
            faults.add(f"the record names {short(name)}, outside its folder", where=folder, fix="do not trust this folder")
        elif not file.is_file():
            faults.add(f"'{name}' is missing", where=folder, fix="merge again")
        elif hash_result(file) != wanted:
            faults.add(f"'{name}' has changed since the merge", where=file, fix="merge again, or restore it")
    for name in _names(folder):
        older = record["format"] == OLDER and "/" in name
        if is_read_by_loaders(name) and name not in record["files"] and not older:
            fix = "move it away: loaders may take it for the model"
            faults.add(f"'{name}' was not part of the result", where=folder / name, fix=fix)
    faults.raise_any(ResultError)
    return record


def _names(folder: Path) -> list[str]:
    """The files that make up a result, those of its chat templates included; hidden ones are read by no loader."""
    files = [*folder.iterdir(), *(folder / TEMPLATES).glob("*")]
    names = [file.relative_to(folder).as_posix() for file in files if file.is_file() and not file.name.startswith(".")]
    return sorted(name for name in names if name not in LATER)
