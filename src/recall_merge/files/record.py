"""`record.json`: what a result was made from, and how; and the check that the result still matches it."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from recall_merge.files.checkpoint import read_json
from recall_merge.files.hashing import hash_result
from recall_merge.runtime.errors import Faults, ResultError, short

RECORD = "record.json"
FORMAT = 2
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
    names = sorted(file.name for file in folder.iterdir() if file.is_file() and file.name not in LATER and not file.name.startswith("."))
    files = {name: hashed.get(name) or hash_result(folder / name) for name in names}
    text = json.dumps({"format": FORMAT, **record, "files": files}, indent=2, ensure_ascii=False) + "\n"
    (folder / RECORD).write_text(text, "utf-8")


def verify_files(folder: Path) -> dict[str, Any]:
    """The record of a result whose files match it. Raises ResultError with every file that is missing, changed, or new."""
    record = read_json(folder / RECORD) if (folder / RECORD).exists() else None
    if record is None or record.get("format") != FORMAT or not isinstance(record.get("files"), dict):
        what = f"there is no {RECORD}" if record is None else f"{RECORD} is in a format that this version does not know"
        raise ResultError(what, where=folder, fix="give the folder of a result of `recall merge`")
    faults = Faults()
    for name, wanted in record["files"].items():
        file = folder / name
        if name in LATER:
            continue
        if Path(name).name != name or len(name) > 255 or "\0" in name:
            faults.add(f"the record names {short(name)}, outside its folder", where=folder, fix="do not trust this folder")
        elif not file.is_file():
            faults.add(f"'{name}' is missing", where=folder, fix="merge again")
        elif hash_result(file) != wanted:
            faults.add(f"'{name}' has changed since the merge", where=file, fix="merge again, or restore it")
    for file in sorted(folder.iterdir()):
        if file.suffix in READ_BY_LOADERS and file.name not in {*record["files"], *LATER}:
            faults.add(f"'{file.name}' was not part of the result", where=file, fix="move it away: loaders may take it for the model")
    faults.raise_any(ResultError)
    return record
