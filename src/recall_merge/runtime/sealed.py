"""JSON files that carry a hash of themselves: a single changed bit is noticed.

It is no signature: whoever changes a file can seal it anew.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from recall_merge.runtime.errors import CheckpointError
from recall_merge.runtime.safe_json import parse_json, read_small

KEY = "blake3"
"""The first key: the BLAKE3 hash of the file's text with this value left empty."""
_SEAL = re.compile(rb'\A\{\s*"blake3": "([0-9a-f]{64})"')


def sealed(content: Mapping[str, Any], *, indent: int | None = 1) -> str:
    """The text of a JSON object, with its hash."""
    text = json.dumps({KEY: "", **content}, ensure_ascii=False, indent=indent, default=float) + "\n"
    return text.replace('""', f'"{blake3(text.encode()).hexdigest()}"', 1)


def read_sealed(path: Path, *, since: int = -1, again: str = "") -> dict[str, Any]:
    """A JSON object from a file that fits its hash, or has none; those of the format `since` have one.

    Raises CheckpointError as `read_json`, and where the hash does not fit; `again` says what to do about that.
    """
    data = read_small(path)
    content, seal = parse_json(data, path), _SEAL.match(data)
    if seal is None:
        if KEY not in content and content.get("format") != since:
            return content
    elif blake3(data[: seal.start(1)] + data[seal.end(1) :]).hexdigest().encode() == seal[1]:
        return {key: value for key, value in content.items() if key != KEY}
    fix = again or f"restore the file; if you changed it on purpose, take its line `{KEY}` out"
    raise CheckpointError(f"{path.name} has changed since it was written: it does not fit its own hash", where=path, fix=fix)
