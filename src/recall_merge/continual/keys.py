"""What tells models and pieces of work from others: fingerprints, keys, and files that say under which key they were made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from recall_merge.files.adapter import CONFIG, WEIGHTS, is_adapter
from recall_merge.files.checkpoint import open_checkpoint, read_json
from recall_merge.files.durable import write_whole
from recall_merge.files.hashing import hash_file, hash_model
from recall_merge.runtime.errors import CheckpointError


def key_of(facts: Mapping[str, Any]) -> str:
    """SHA-256 of facts: two pieces of work with the same key give the same result."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def fingerprint(folder: Path) -> str:
    """SHA-256 of a model: an adapter's weights and settings, or a checkpoint's weights and config.

    Where an adapter's base lies is left out, so that folders can be moved; so is the order of names, which PEFT leaves to chance.

    Raises:
        CheckpointError: if there is no sound model.
    """
    if not folder.is_dir():
        raise CheckpointError("there is no such model folder", where=folder, fix="check the path")
    if not is_adapter(folder):
        return hash_model(open_checkpoint(folder))
    settings = {key: sorted(value, key=str) if isinstance(value, list) else value for key, value in read_json(folder / CONFIG).items()}
    settings.pop("base_model_name_or_path", None)
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"there is no {WEIGHTS}", where=folder, fix="copy the whole adapter folder")
    return key_of({"settings": settings, "weights": hash_file(folder / WEIGHTS)})


class KeyedFile:
    """A JSON file that says under which key its content was made. Content of another key is ignored, and replaced by the first `write`."""

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key, self.exists = path, key, False
        self.content: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            stored = json.loads(path.read_text("utf-8"))
            if isinstance(stored, dict) and stored.pop("key", None) == key:
                self.content = stored
                self.exists = True

    def write(self) -> None:
        """Put the content in its place, in one step."""
        write_whole(self._path, json.dumps({"key": self._key, **self.content}, ensure_ascii=False, indent=1) + "\n")
