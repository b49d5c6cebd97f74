"""JSON objects from files, within bounds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from recall_merge.runtime.errors import CheckpointError

MAX_JSON = 64_000_000  # bytes of a file that describes a model, an adapter or a result
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # one that stands alone is no text: it can be read, and written nowhere
AGAIN = "the file is damaged: copy or download it again"
NO_MODEL = "give the folder of a Hugging Face model or adapter"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError if it is missing, not JSON, or not an object."""
    return parse_json(read_small(path), path)


def read_small(path: Path) -> bytes:
    """All bytes of a file that describes something. Raises CheckpointError if it is missing, no file, or too long."""
    try:
        if path.exists() and not path.is_file():  # a pipe would never end
            raise CheckpointError(f"{path.name} is not a file", where=path, fix=NO_MODEL)
        with path.open("rb") as file:
            data = file.read(MAX_JSON + 1)
    except FileNotFoundError:
        raise CheckpointError(f"there is no {path.name}", where=path.parent, fix=NO_MODEL) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}", where=path, fix=AGAIN) from error
    if len(data) > MAX_JSON:
        raise CheckpointError(f"{path.name} is longer than {MAX_JSON:,} bytes", where=path, fix=AGAIN)
    return data


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in a file's bytes."""
    try:
        value = json.loads(data.decode("utf-8"))
        if SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}", where=path, fix=AGAIN) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} is not a JSON object", where=path, fix=AGAIN)
    return value
