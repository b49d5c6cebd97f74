"""The files beside the weights of a model: config, generation config, tokenizer, chat template, processors, code, licence."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recall_merge.files.checkpoint import AGAIN, NO_WEIGHTS, OTHER_FORMATS, PICKLES, read_json, text_part
from recall_merge.files.hashing import hash_file
from recall_merge.files.inert_folder import GENERATION, OF_TOKENIZERS, open_tokenizer
from recall_merge.files.links import TEMPLATES
from recall_merge.files.vocabulary import Vocabulary, read_vocabulary
from recall_merge.runtime.errors import CheckpointError
from recall_merge.runtime.inert import inert_config
from recall_merge.runtime.safe_json import read_small

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
TOKENIZER = "tokenizer_config.json"
OURS = ("README.md", "config.json", "record.json", "stats.json", "weights.png")  # what every result has of its own
WEIGHTS = (".safetensors", ".index.json", *PICKLES, *OTHER_FORMATS)
LEFT_BY_TRAINERS = (
    *NO_WEIGHTS, "trainer_state", "all_results", "train_results", "eval_results", "predict_results", "events.out", "zero_to_fp32",
    "trainer_log", "running_log", "debug.log", "training_loss", "training_eval", "llamaboard_config", "tokens_state", "value_head",
)  # fmt: skip


def write_companions(
    target: Path, base: Path, experts: Sequence[Path], vocabulary: Vocabulary | None, dtype: str | None, speaker: Path
) -> None:
    """Write all files but weights, statistics and record.

    What servers and people need lies in the base's folder, and comes from there: all that is neither weights nor a result's own.
    """
    _copy(base, target, tokenizer=False)
    write_settings(target, base, experts, vocabulary, dtype, speaker)


def write_settings(
    target: Path, base: Path, experts: Sequence[Path], vocabulary: Vocabulary | None, dtype: str | None, speaker: Path
) -> None:
    """Write what transformers reads beside the weights: config, generation config and tokenizer.

    Files that belong together come from one model: tokenizer, chat template, start, end and padding are those of `speaker`, whose tokens
    the vocabulary chose. `dtype` is that of the result's weights where the run gives one; None keeps what the base's config says.

    Raises CheckpointError if a tokenizer that is needed cannot be read, extended or saved.
    """
    config = inert_config(read_json(base / "config.json"), local=True)
    config.pop("_name_or_path", None)  # may be a local path
    if dtype is not None:
        config.pop("torch_dtype", None)  # the old name of the setting
        config["dtype"] = dtype
    if (base / GENERATION).is_file():
        shutil.copyfile(base / GENERATION, target / GENERATION)
    if vocabulary is not None:
        (config if "vocab_size" in config else text_part(config))["vocab_size"] = vocabulary.size
    if vocabulary is not None and vocabulary.added:
        tokenizer = _extended_tokenizer(base, experts, vocabulary)
        try:
            tokenizer.save_pretrained(target)
        except Exception as error:  # odd settings that are never read show here
            raise CheckpointError(f"the base's tokenizer cannot be saved: {error}", where=base, fix=AGAIN) from error
    else:
        tokens = base if vocabulary is None else vocabulary.tokenizer
        if speaker != tokens and read_vocabulary(speaker) is None:  # an adapter with a template alone
            _copy(tokens, target, tokenizer=True)
        if speaker != base:
            _take_token_ids(speaker, tokens, target, config)
        _copy(speaker, target, tokenizer=True)
    (target / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")


def chat_template(folder: Path) -> Any:
    """A folder's chat template, as transformers finds it; None if there is none."""
    if (folder / "chat_template.jinja").is_file():
        try:
            return read_small(folder / "chat_template.jinja").decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError("the chat template is not UTF-8 text", where=folder / "chat_template.jinja", fix=AGAIN) from error
    found = (_optional(folder / file).get("chat_template") for file in (TOKENIZER, "chat_template.json"))
    return next(filter(None, found), None)


def hash_texts(folder: Path) -> str:
    """SHA-256 of what decides how a model reads and writes text: tokenizer, chat templates and generation config."""
    files = [file for file in folder.iterdir() if OF_TOKENIZERS.match(file.name) or file.name == GENERATION]
    files += (folder / TEMPLATES).glob("[!.]*.jinja")
    hashes = {file.relative_to(folder).as_posix(): hash_file(file) for file in files if file.is_file()}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def ends(folder: Path) -> dict[str, Any]:
    """What ends a turn, as far as a folder says: the end token, and the ids at which the model stops."""
    ids = {**_optional(folder / "config.json"), **_optional(folder / GENERATION)}.get("eos_token_id")
    said = {"eos_token": _special(folder, "eos_token"), "eos_token_id": None if ids is None else _listed(ids)}
    return {key: value for key, value in said.items() if value is not None}


def _extended_tokenizer(base: Path, experts: Sequence[Path], vocabulary: Vocabulary) -> Any:
    """The base's tokenizer with the experts' tokens added, special ones as special."""
    tokenizer = open_tokenizer(base)
    donors = [open_tokenizer(folder) for folder in experts if read_vocabulary(folder) is not None]
    for row, token in enumerate(vocabulary.added, start=len(tokenizer)):
        tokenizer.add_tokens([token], special_tokens=any(token in donor.all_special_tokens for donor in donors))
        if tokenizer.convert_tokens_to_ids(token) != row:
            what = f"the base's tokenizer cannot take the token {token!r} at row {row}"
            raise CheckpointError(what, where=vocabulary.tokenizer, fix="choose `vocabulary: base` or `newest`")
    return tokenizer


def _take_token_ids(speaker: Path, tokens: Path, target: Path, config: dict[str, Any]) -> None:
    """Start, end and padding in `config` and the generation config: a model's; or an adapter's tokenizer's, and the base's ends."""
    generation = _optional(target / GENERATION)
    if (speaker / "config.json").is_file():
        theirs = read_json(speaker / "config.json")
        for ours, own in ((config, theirs), (text_part(config), text_part(theirs))):
            _replace(ours, {key: own.get(key) for key in TOKEN_IDS} if own else {})
        _replace(generation, {key: theirs.get(key) for key in TOKEN_IDS})
        generation = _optional(speaker / GENERATION) or generation
    else:
        known = read_vocabulary(speaker) or read_vocabulary(tokens) or {}
        ids = {key: known.get(_special(speaker, key.removesuffix("_id")) or "") for key in TOKEN_IDS}
        new = {key: value for key, value in ids.items() if value is not None}
        for ours in (config, generation):
            if ours and (end := new.get("eos_token_id")) is not None:
                stops = [end, *(old for old in _listed(ours.get("eos_token_id")) if old != end)]
                ours.update(new, eos_token_id=stops if stops[1:] else end)
    if generation:
        (target / GENERATION).write_text(json.dumps(generation, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _replace(settings: dict[str, Any], new: Mapping[str, Any]) -> None:
    """Set what is given, and take out what is None."""
    for key, value in new.items():
        settings.pop(key, None)
        settings |= {} if value is None else {key: value}


def _special(folder: Path, name: str) -> str | None:
    """A special token of a folder's tokenizer."""
    found = (_optional(folder / file).get(name) for file in (TOKENIZER, "special_tokens_map.json"))
    token = next(filter(None, found), None)
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) else None


def _listed(ids: Any) -> list[Any]:
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _copy(source: Path, target: Path, *, tokenizer: bool) -> None:
    """Copy the files of a tokenizer, or all others, but weights, what trainers leave, and what a result has of its own."""
    for file in sorted(source.iterdir()):
        left = file.name in OURS or file.name.endswith(WEIGHTS) or file.name.startswith((".", *LEFT_BY_TRAINERS))
        if file.is_file() and not left and bool(OF_TOKENIZERS.match(file.name)) is tokenizer:
            shutil.copyfile(file, target / file.name)
    if tokenizer and (source / TEMPLATES).is_dir():
        (target / TEMPLATES).mkdir(exist_ok=True)
        for file in sorted((source / TEMPLATES).glob("[!.]*.jinja")):
            shutil.copyfile(file, target / TEMPLATES / file.name)
