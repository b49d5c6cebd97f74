"""A Hugging Face folder: its config and, by byte range, its tensors. Nothing of it is ever run or unpickled."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recall_merge.errors import CheckpointError, Faults
from recall_merge.files.safetensors import FLOATS, Spec, Stored, read_header
from recall_merge.maths.depths import Depths, find_depths

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BLOCK_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # the spellings of L in transformers' configs
HEADS = re.compile(r"(^|\.)(lm_head|embed_out)\.(weight|bias)$")
POSITIONS = re.compile(r"wpe|pos")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """One model in a folder. Only headers are held; `read` fetches a tensor's bytes.

    `tensors` lists every tensor once: a head that is tied to the embedding, and stored beside it, is left out.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    depths: Depths

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name].read()

    @property
    def specs(self) -> dict[str, Spec]:
        return {name: stored.spec for name, stored in self.tensors.items()}

    @property
    def nbytes(self) -> int:
        return sum(stored.spec.nbytes for stored in self.tensors.values())

    @property
    def dtypes(self) -> set[str]:
        """The floating-point dtypes in use, as torch names them."""
        return {FLOATS[stored.spec.dtype] for stored in self.tensors.values() if stored.spec.is_float}

    @cached_property
    def vocabulary_size(self) -> int:
        """Rows of the input embedding, as the config says; often more than the tokenizer has tokens."""
        return _text_config(self.config)["vocab_size"]

    @cached_property
    def embedding(self) -> str:
        """The input embedding: the tensor before the blocks that has a row for each token."""
        return _embedding(self.config, self.tensors, self.depths)

    @cached_property
    def token_tensors(self) -> tuple[str, ...]:
        """The tensors whose rows are tokens: the input embedding and, where it is one of its own, the head."""
        return (self.embedding, *(name for name in self.tensors if HEADS.search(name)))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of names, dtypes, shapes and of the first 256 bytes of every tensor: tells models apart at little cost."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            stored = self.tensors[name]
            digest.update(f"{name} {stored.spec}".encode())
            with stored.file.open("rb") as file:
                file.seek(stored.begin)
                digest.update(file.read(min(256, stored.spec.nbytes)))
        return digest.hexdigest()


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a folder's config and headers.

    Raises:
        CheckpointError: with every fault found: missing, damaged or pickled weights, a bad index, quantised weights, unknown depths.
    """
    faults = Faults()
    config: dict[str, Any] = {}
    stored: dict[str, Stored] = {}
    with faults.collect():
        config = read_json(folder / "config.json")
    with faults.collect():
        for file in _weight_files(folder):
            with faults.collect():
                stored |= read_header(file)
        _check_index(folder, stored)
    faults.raise_any(CheckpointError)

    if config.get("quantization_config"):
        faults.add("the weights are quantised", where=folder / "config.json", fix="dequantise the model first, and merge that")
    for name, tensor in stored.items():
        if tensor.spec.dtype not in FLOATS and tensor.spec.numel > 4096 and tensor.spec.dtype != "BOOL":
            faults.add(f"tensor '{name}' is of dtype {tensor.spec.dtype}", where=tensor.file, fix="merge a model in F32, F16 or BF16")
            break
    faults.raise_any(CheckpointError)
    depths = _depths(folder, config, stored)
    checkpoint = Checkpoint(folder, config, _without_tied_head(folder, config, stored, depths), depths)
    _ = checkpoint.embedding  # config and weights must agree on the vocabulary
    return checkpoint


def block_count(config: Mapping[str, Any]) -> int | None:
    """L as a config states it, at its top level or in its text model's part."""
    for part in (config, config.get("text_config") or {}):
        for key in BLOCK_COUNTS:
            if isinstance(part.get(key), int):
                return part[key]
    return None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: if it is missing, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"there is no {path.name}", where=path.parent, fix="give the folder of a Hugging Face model or adapter"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path.name} cannot be read: {error}", where=path, fix="the file is damaged: copy or download it again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} is not a JSON object", where=path, fix="the file is damaged: copy or download it again")
    return value


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        raise CheckpointError(
            f"the folder holds two models, {SINGLE} and {INDEX}: loaders take the first without a word",
            where=folder,
            fix="delete the one that is out of date",
        )
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise CheckpointError("the index has no weight_map", where=index, fix="the file is damaged: copy or download it again")
        faults = Faults()
        files = [folder / name for name in sorted(set(names.values()))]
        for file in files:
            if file.name != str(file.relative_to(folder)) or file.suffix != ".safetensors":
                faults.add(
                    f"the index names '{file.relative_to(folder)}', outside its folder or not safetensors", where=index, fix="do not use it"
                )
            elif not file.exists():
                faults.add(f"the index names '{file.name}', which is missing", where=folder, fix="copy or download the missing file")
        faults.raise_any(CheckpointError)
        return files
    if single.exists():
        return [single]
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"the weights are pickled ({', '.join(pickles[:3])}); loading a pickle runs code, so it is never done here",
            where=folder,
            fix="convert them where you trust them: AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)",
        )
    raise CheckpointError("there are no weights in this folder", where=folder, fix=f"it should hold {SINGLE}, or {INDEX} and its shards")


def _check_index(folder: Path, stored: Mapping[str, Stored]) -> None:
    index = folder / INDEX
    if not index.exists() or not stored:
        return
    promised = read_json(index)["weight_map"]
    faults = Faults()
    for name in sorted(set(promised) - set(stored))[:5]:
        faults.add(f"the index promises tensor '{name}', which no shard holds", where=index, fix="copy or download the model again")
    for name in sorted(set(stored) - set(promised))[:5]:
        faults.add(f"a shard holds tensor '{name}', which the index does not list", where=stored[name].file, fix="copy the model again")
    faults.raise_any(CheckpointError)


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config if "vocab_size" in config else config.get("text_config") or {}


def _embedding(config: Mapping[str, Any], names: Mapping[str, Stored], depths: Depths) -> str:
    rows = _text_config(config).get("vocab_size")
    found = [
        name
        for name, stored in names.items()
        if depths.of(name) == 0 and len(stored.spec.shape) == 2 and stored.spec.shape[0] == rows and not POSITIONS.search(name)
    ]
    if len(found) != 1:
        raise CheckpointError(
            f"the config says vocab_size {rows}; {'no tensor' if not found else 'more than one tensor'} before the blocks has that many rows",
            where=next(iter(names.values())).file.parent,
            fix="config and weights must be of the same model: copy or download it again",
        )
    return found[0]


def _without_tied_head(folder: Path, config: Mapping[str, Any], stored: dict[str, Stored], depths: Depths) -> dict[str, Stored]:
    """Leave out a head that is the embedding stored a second time. Where the config does not say, equal bytes say that it is tied."""
    tied = config.get("tie_word_embeddings", (config.get("text_config") or {}).get("tie_word_embeddings"))
    head = next((name for name in stored if HEADS.search(name) and name.endswith("weight")), None)
    if tied is False or head is None:
        return stored
    embedding = _embedding(config, stored, depths)
    if stored[head].same_bytes(stored[embedding]):
        return {name: tensor for name, tensor in stored.items() if name != head}
    if tied:
        raise CheckpointError(
            f"the config ties head and embedding, yet '{head}' differs from '{embedding}'",
            where=folder,
            fix="set tie_word_embeddings to false in config.json if the head was trained apart; else save the model again",
        )
    return stored


def _depths(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Stored]) -> Depths:
    blocks = block_count(config)
    if blocks is None:
        raise CheckpointError(
            "the config does not say how many blocks there are", where=folder / "config.json", fix="add num_hidden_layers"
        )
    try:
        return find_depths(tensors, blocks)
    except ValueError as error:
        raise CheckpointError(str(error), where=folder, fix="recall merges decoder-only models with one list of blocks") from error
