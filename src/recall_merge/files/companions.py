"""The files beside the weights of a model: config, generation config, tokenizer, chat template, code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recall_merge.files.checkpoint import read_json
from recall_merge.files.vocabulary import TOKENIZER_FILES, Vocabulary, read_vocabulary
from recall_merge.runtime.errors import CheckpointError

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_companions(target: Path, base: Path, experts: Sequence[Path], vocabulary: Vocabulary | None, dtype: str | None) -> None:
    """Write all files but weights, statistics and record.

    Config, generation config and code files are the base's; tokenizer and chat template are those that the vocabulary chose. `dtype` is
    that of the result's weights where the run gives one; None keeps what the base's config says.
    """
    config = read_json(base / "config.json")
    config.pop("_name_or_path", None)  # may be a local path
    if dtype is not None:
        config.pop("torch_dtype", None)  # the old name of the setting
        config["dtype"] = dtype
    code = [file.name for file in base.glob("*.py")]
    _copy(base, target, (*code, "generation_config.json", "preprocessor_config.json", "processor_config.json"))
    if vocabulary is None:
        _copy_tokenizer(base, target)
    else:
        (config if "vocab_size" in config else config["text_config"])["vocab_size"] = vocabulary.size
        if vocabulary.added:
            _extended_tokenizer(base, experts, vocabulary).save_pretrained(target)
        else:
            _copy_tokenizer(vocabulary.tokenizer, target)
            _take_token_ids(vocabulary.tokenizer, target, config)
    (target / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _copy_tokenizer(source: Path, target: Path) -> None:
    _copy(source, target, TOKENIZER_FILES)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", target / "additional_chat_templates")


def _extended_tokenizer(base: Path, experts: Sequence[Path], vocabulary: Vocabulary) -> Any:
    """The base's tokenizer with the experts' tokens added, special ones as special."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    donors = [AutoTokenizer.from_pretrained(folder, trust_remote_code=False) for folder in experts if read_vocabulary(folder) is not None]
    for row, token in enumerate(vocabulary.added, start=len(tokenizer)):
        tokenizer.add_tokens([token], special_tokens=any(token in donor.all_special_tokens for donor in donors))
        if tokenizer.convert_tokens_to_ids(token) != row:
            raise CheckpointError(f"the base's tokenizer cannot take the token {token!r} at row {row}", where=vocabulary.tokenizer)
    return tokenizer


def _take_token_ids(donor: Path, target: Path, config: dict[str, Any]) -> None:
    """Start, end and padding are token ids, so they come from the model that the tokens come from."""
    if not (donor / "config.json").exists():
        return
    theirs = read_json(donor / "config.json")
    config |= {key: theirs[key] for key in TOKEN_IDS if key in theirs}
    _copy(donor, target, ("generation_config.json",))


def _copy(source: Path, target: Path, names: Sequence[str]) -> None:
    """Copy those of these files that exist."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
