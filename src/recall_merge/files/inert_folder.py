"""A model's folder as other libraries may read it, with configs that do nothing; and its tokenizer, read so."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from recall_merge.files.checkpoint import AGAIN, read_json
from recall_merge.files.links import TEMPLATES
from recall_merge.runtime.errors import CheckpointError
from recall_merge.runtime.inert import check_counts, inert_config, inert_tokenizer
from recall_merge.runtime.safe_json import MAX_JSON

GENERATION = "generation_config.json"
OF_TOKENIZERS = re.compile(
    r"(tokeniz|vocab|merges|special_tokens_map|added_tokens|chat_template|spiece|sentencepiece|tekken|tiktoken|bpe\.codes)|.*\.(model|tiktoken)$"
)
CLEANED: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"config.json": inert_config, "tokenizer_config.json": inert_tokenizer}


def check_lengths(folder: Path) -> None:
    """Raises CheckpointError for files that other libraries would read as a whole, and that are longer than any model's."""
    for file in [*folder.glob("*"), *folder.glob(f"{TEMPLATES}/*")]:  # none in a folder that is not there
        read = file.name == GENERATION or file.parent != folder or OF_TOKENIZERS.match(file.name)
        if read and file.is_file() and file.stat().st_size > MAX_JSON:
            raise CheckpointError(f"{file.name} is longer than {MAX_JSON:,} bytes", where=file, fix=AGAIN)


@contextmanager
def inert(folder: Path) -> Iterator[Path]:
    """The folder, for a library to read configs and tokenizer from; where its configs act, one of links to its other files."""
    check_lengths(folder)
    configs = {name: read_json(folder / name) for name in CLEANED if (folder / name).exists()}
    check_counts(configs.get("config.json", {}), folder / "config.json")
    changed = {name: clean for name, config in configs.items() if (clean := CLEANED[name](config)) != config}
    if not changed:
        yield folder
        return
    with TemporaryDirectory() as place:
        for file in folder.absolute().iterdir():
            if file.name not in changed:
                (Path(place) / file.name).symlink_to(file)
        for name, config in changed.items():
            (Path(place) / name).write_text(json.dumps(config), "utf-8")
        yield Path(place)


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, as transformers reads it. Raises CheckpointError if it cannot."""
    from transformers import AutoTokenizer

    try:
        with inert(folder) as place:
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        tokenizer.encode("")  # odd settings show at the first use
    except CheckpointError:
        raise
    except BaseException as error:  # what tokenizers' classes raise about odd files has no common type
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # which is what Rust's code raises
            raise
        what = f"there is no usable tokenizer: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        raise CheckpointError(what, where=folder, fix="copy the tokenizer's files there") from error
    tokenizer.name_or_path = str(folder)
    return tokenizer
