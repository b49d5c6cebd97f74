"""What leaves this machine with a result: the files that its record names, and a model card; no path of the machine.

Where an adapter was trained on a folder, its config gets the base's name on the hub, in the copy that goes out: record and input statistics
hold hashes of the config, and follow. Nothing on the disk is changed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from recall_merge.files.adapter import CONFIG, WEIGHTS, is_adapter
from recall_merge.files.companions import TOKENIZER
from recall_merge.files.experts import hash_adapter
from recall_merge.files.hashing import FileStates, hash_file
from recall_merge.files.hub import Reference, meaning, parse_reference
from recall_merge.files.inert_folder import GENERATION
from recall_merge.files.model_card import MODEL_CARD, card_to_publish
from recall_merge.files.ownership import names_in
from recall_merge.files.record import LATER, RECORD
from recall_merge.files.statistics import STATS, has_statistics, open_statistics
from recall_merge.files.statistics import WEIGHTS as MOMENTS
from recall_merge.merging.verify import verify
from recall_merge.runtime.errors import CheckpointError, Faults, ResultError, RunError
from recall_merge.runtime.safe_json import parse_json, read_json
from recall_merge.runtime.sealed import sealed

Content = Path | bytes
MAY_HOLD_PATHS = (RECORD, STATS, "config.json", GENERATION, TOKENIZER)  # what trainers and transformers write paths into
IS_PATH = re.compile(r"(/[^/\n]+){2,}/?|~/.+|file://.+|[A-Za-z]:\\.+")


@dataclass(frozen=True)
class Outgoing:
    """A result as it goes out."""

    folder: Path
    record: Mapping[str, Any]
    files: Mapping[str, Content]
    """By their names in the repository."""
    left: tuple[str, ...]
    """Files of the folder that stay here, as the record does not name them."""
    states: FileStates
    """The folder's files as they were verified."""


def read(content: Content) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def size(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def collect(folder: Path, *, license: str | None = None, base_model: str | None = None) -> Outgoing:
    """Check a result or an expert, byte by byte, and what it says in public. `license` and `base_model` go into its card.

    Raises:
        RecallError: with every fault: of the folder, of its card, and every path of this machine in its files.
    """
    states, faults = FileStates.of([folder]), Faults()
    record = faults.attempt(verify, folder)
    if not (folder / RECORD).is_file():
        faults.raise_any()
    renamed: dict[str, bytes] = {}
    with faults.collect():
        base_model, renamed = _public_base(folder, record, base_model)
    card = faults.attempt(card_to_publish, folder, license=license, base_model=base_model)
    files: dict[str, Content] = {}
    if record is not None:
        names = [RECORD, *(name for name in record["files"] if name not in LATER), *((STATS, MOMENTS) if has_statistics(folder) else ())]
        files = {name: folder / name for name in names} | renamed
    if card is not None:
        edited = license is not None or base_model is not None or not (folder / MODEL_CARD).is_file()
        files[MODEL_CARD] = str(card).encode() if edited else folder / MODEL_CARD
    for name, path in _local_paths(folder, files):
        fix = "write a public name instead; where the record holds the file's hash, merge again"
        faults.add(f"'{name}' holds a path of this machine: {path}", where=folder / name, fix=fix)
    faults.raise_any(ResultError)
    assert record is not None
    left = [name for name in names_in(folder) if name not in files and not name.startswith(".")]
    return Outgoing(folder, record, files, tuple(left), states)


def _public_base(folder: Path, record: Mapping[str, Any] | None, given: str | None) -> tuple[str | None, dict[str, bytes]]:
    """What the card calls the base; and, for an adapter whose config calls it otherwise, the files that change with its name there."""
    if given is not None and ((reference := parse_reference(given)) is None or reference.revision is not None):
        raise RunError(f"the base model '{given}' is no name on the hub", where="--base-model", fix="give org/name")
    if not is_adapter(folder):
        return given, {}
    config = read_json(folder / CONFIG)
    named = config.get("base_model_name_or_path")
    known = meaning(named) if isinstance(named, str) and named else None
    if given is None and not isinstance(known, Reference):
        what = f"{CONFIG} names the base by a folder of this machine, {named}" if named else f"{CONFIG} does not name the base"
        raise CheckpointError(what, where=folder / CONFIG, fix="give its name on the hub: --base-model org/name")
    public = {"base_model_name_or_path": given}
    if given is None and isinstance(known, Reference):  # perhaps by a path into the hub's cache, which tells the commit
        public = {"base_model_name_or_path": known.repo, "revision": known.revision or config.get("revision")}
    same = config.items() >= public.items()
    return public["base_model_name_or_path"], {} if record is None or same else _rename_base(folder, {**config, **public}, record)


def _rename_base(folder: Path, config: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, bytes]:
    """An adapter's new config, and the record and statistics with its hash."""
    text = json.dumps(config, indent=2, sort_keys=True).encode()
    files = {**record["files"], CONFIG: blake3(text).hexdigest()}
    renamed = {CONFIG: text, RECORD: sealed({**record, "files": files}, indent=2).encode()}
    statistics, hashes = open_statistics(folder), {CONFIG: hash_file(folder / CONFIG), WEIGHTS: hash_file(folder / WEIGHTS)}
    if statistics is not None and statistics.facts["expert"] == hash_adapter(hashes):
        expert = hash_adapter(hashes | {CONFIG: hashlib.sha256(text).hexdigest()})
        renamed[STATS] = sealed({**statistics.facts, "expert": expert}).encode()
    return renamed


def _local_paths(folder: Path, files: Mapping[str, Content]) -> Iterator[tuple[str, str]]:
    """Paths of this machine in the files that may hold some, each with the name of its file."""
    own = "|".join(re.escape(str(place)) for place in {Path.home(), folder.resolve().parent} if place != Path("/"))
    places = re.compile(rf"(?<![\w./-])({own or '(?!)'})(?![\w.-])[^\s\"'`)]*")
    for name in sorted({MODEL_CARD, *MAY_HOLD_PATHS} & set(files)):
        data = read(files[name])
        for text in [data.decode("utf-8", "replace")] if name == MODEL_CARD else _texts(parse_json(data, folder / name)):
            whole = name != MODEL_CARD and IS_PATH.fullmatch(text)
            yield from [(name, text)] if whole else ((name, match[0]) for match in places.finditer(text))


def _texts(value: Any) -> Iterator[str]:
    """All texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(part)
