"""A Hugging Face folder: its config and, by byte range, its tensors. Nothing in it is ever run or unpickled."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from recall_merge.files.links import check_links
from recall_merge.files.resolved_config import resolved
from recall_merge.files.safetensors import FLOATS, PACKED, RemoteFile, StoredTensor, TensorSpec, read_header
from recall_merge.maths.layers import Layers, find_layers
from recall_merge.runtime.errors import CheckpointError, Faults, short
from recall_merge.runtime.safe_json import AGAIN, read_json

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BLOCK_COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
)  # the spellings of L in transformers' configs
TEXT_PARTS = ("text_config", "llm_config", "language_config")
EXTRA_BLOCKS = "num_nextn_predict_layers"  # blocks after the last one, which predict further tokens; transformers passes over them
MAX_BLOCKS = 10**6  # larger numbers are damage
BLOCK_LIST = "layers_block_type"  # one entry per block, in configs that give no number
HEADS = re.compile(r"(^|\.)(lm_head|embed_out|output_projection|head)\.(weight|bias)$")
COMPUTED = (".rotary_emb.inv_freq", ".masked_bias")  # tables that old versions of transformers stored and new ones compute; and masks
PACKED_NAME = re.compile(r"weight|zeros|packed|quant|_(blocks|scales)$")
NOT_TEXT = re.compile(r"wpe|pos|vision|visual|image|audio|encoder|connector|proj")
POSITIONS = re.compile(r"wpe|pos")
ADAPTER, WHOLE_ADAPTER = "adapter_model.safetensors", "copy the whole folder of the adapter"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state")  # pickles that trainers leave beside the weights
OTHER_FORMATS = (".gguf", ".onnx", ".h5", ".msgpack")
DAMAGED_MODEL = "the model is damaged: copy or download it again"
SAVE_WHOLE = "save it again with all of its weights gathered: under DeepSpeed's ZeRO-3, stage3_gather_16bit_weights_on_model_save"


@dataclass(frozen=True)
class Checkpoint:
    """One model in a folder. Only headers are held; `read` fetches a tensor's bytes.

    `tensors` lists every parameter once, without a head that is tied to the embedding but stored, and without tables that transformers
    computes itself (rotary frequencies, causal masks), which old files hold.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    layers: Layers
    held: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)
    """Tensors in memory, read once for several uses. They must not be changed."""

    def read(self, name: str, span: range | None = None) -> torch.Tensor:
        if name not in self.held:
            return self.tensors[name].read(span)
        return self.held[name].view(-1)[span.start : span.stop] if span else self.held[name]

    @property
    def specs(self) -> dict[str, TensorSpec]:
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
        """Rows of the input embedding according to the config; often more than the tokenizer has tokens."""
        return _setting(self.config, "vocab_size")

    @cached_property
    def embedding(self) -> str:
        """The input embedding: the tensor before the blocks with one row per token."""
        return self.token_tensors[0]

    @cached_property
    def token_tensors(self) -> tuple[str, ...]:
        """The tensors whose rows are tokens: the input embedding, others named after it ('.._per_layer'), and a head that is not tied."""
        rows, shapes = self.vocabulary_size, {name: stored.spec.shape for name, stored in self.tensors.items() if self.layers.of(name) == 0}
        tables = [name for name, shape in shapes.items() if len(shape) == 2 and shape[0] == rows and not POSITIONS.search(name)]
        if self.layers.towers:  # other towers may have tables of as many rows
            tables = [name for name in tables if not NOT_TEXT.search(name)]
        tables.sort(key=len)
        if not tables or not all(name.startswith(tables[0].removesuffix(".weight")) for name in tables):
            if empty := sorted(name for name, stored in self.tensors.items() if stored.spec.shape == (0,)):
                raise CheckpointError(f"the model's '{empty[0]}' is empty", where=self.folder, fix=SAVE_WHOLE)
            what = f"the config says vocab_size {rows}; {'more than one' if tables else 'no'} tensor before the blocks has that many rows"
            fix = "config and weights must be of the same model: copy it again; recall merges models with one table of so many rows"
            raise CheckpointError(what, where=self.folder, fix=fix)
        return (*tables, *filter(self.is_head, self.tensors))

    def is_head(self, name: str) -> bool:
        return HEADS.search(name) is not None and self.layers.of(name) == self.layers.last

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embedding, not a tensor of its own."""
        return self.config.get("tie_word_embeddings") is not False and not any(map(self.is_head, self.tensors))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of names, dtypes, shapes and the first 256 bytes of every tensor. Models with different fingerprints differ; models with
        the same one may differ too, which `hashing.py` decides."""
        digest = hashlib.sha256()
        for name, stored in sorted(self.tensors.items()):
            digest.update(f"{name} {stored.spec}".encode() + stored.identity())
        return digest.hexdigest()


def open_checkpoint(folder: Path, remote: Mapping[str, RemoteFile] = MappingProxyType({})) -> Checkpoint:
    """Read a folder's config and headers. `remote`: weight files that are still on the hub, by name.

    Raises CheckpointError with every fault found: missing, damaged or pickled weights, a bad index, quantised weights, unknown layers.
    """
    if not (folder / "config.json").exists() or not any(map(_may_be_weights, files_in(folder, remote))):
        check_below(folder)
    if not (folder / "config.json").exists() and not (folder / "adapter_config.json").exists() and (folder / ADAPTER).exists():
        raise CheckpointError("there is no adapter_config.json beside the adapter's weights", where=folder, fix=WHOLE_ADAPTER)
    faults, config, stored = Faults(), {}, {}
    with faults.collect():
        config = read_json(folder / "config.json")
        check_links(folder)
    with faults.collect():
        stored = _read_headers(folder, remote)
    faults.raise_any(CheckpointError)

    if (folder / "adapter_config.json").exists():  # transformers would fetch the base that it names
        fix = "give the adapter as an expert; or move one of the two to a folder of its own"
        faults.add("the folder holds an adapter as well as a model: which of them is meant?", where=folder, fix=fix)
    if config.get("transformers_weights") not in (None, SINGLE, INDEX):
        what = f"the config takes its weights from {short(config['transformers_weights'])}, not from the usual files"
        faults.add(what, where=folder / "config.json", fix=f"take out `transformers_weights`, or name that file {SINGLE}")
    if config.get("quantization_config"):
        faults.add("the weights are quantised", where=folder / "config.json", fix="dequantise the model first, and merge that")
    unfit = [name for name, tensor in stored.items() if _is_packed(name, tensor.spec)]
    if unfit:
        what = f"tensor '{unfit[0]}' is of dtype {stored[unfit[0]].spec.dtype}" + (f" (and {len(unfit) - 1} more)" if unfit[1:] else "")
        faults.add(what, where=stored[unfit[0]].file, fix="merge a model in F32, F16 or BF16")
    faults.raise_any(CheckpointError)
    if (blocks := block_count(config)) is None:
        what = "the config does not say how many blocks there are"
        raise CheckpointError(what, where=folder / "config.json", fix="add num_hidden_layers")
    try:
        rows = _setting(config, "vocab_size")
        tables = [name for name, tensor in stored.items() if len(tensor.spec.shape) == 2 and tensor.spec.shape[0] == rows]
        embedding = min((name for name in tables if not HEADS.search(name) and not NOT_TEXT.search(name)), key=len, default="")
        extra = _setting(config, EXTRA_BLOCKS) or 0
        layers = find_layers(stored, blocks, extra=extra, embedding=embedding, towers=bool(text_part(config)))
    except ValueError as error:
        what = f"this is an encoder-decoder: {error}" if config.get("is_encoder_decoder") else str(error)
        raise CheckpointError(what, where=folder, fix="recall merges decoder-only models with one list of blocks") from error
    checkpoint = _without_tied_head(Checkpoint(folder, config, stored, layers))
    _ = checkpoint.embedding  # config and weights must agree on the vocabulary
    return checkpoint


def check_below(folder: Path) -> None:
    """Raises CheckpointError if subfolders are adapters, as trainers leave them; it names the last of their checkpoints."""
    adapters = [config.parent for config in folder.glob("*/adapter_config.json")]
    steps = {below: int(match[1]) for below in adapters if (match := re.fullmatch(r"checkpoint-(\d+)", below.name))}
    if adapters:
        last = max(sorted(adapters), key=lambda below: steps.get(below, -1))
        what = f"this folder is no model; its subfolder '{last.name}' is an adapter"
        raise CheckpointError(what, where=folder, fix=f"give the folder of the adapter itself: {last}")


def _may_be_weights(name: str) -> bool:
    return name.endswith((".safetensors", *PICKLES, *OTHER_FORMATS)) and not name.startswith(NO_WEIGHTS)


def _is_packed(name: str, spec: TensorSpec) -> bool:
    """Whether a tensor holds weights in blocks of few bits, by its dtype and name: MXFP4, GPTQ, AWQ, bitsandbytes, FP8."""
    bytewise = spec.dtype in ("U8", "I8") and len(spec.shape) > 1
    return spec.dtype in PACKED or (not spec.is_float and (bytewise or PACKED_NAME.search(name) is not None))


def block_count(config: Mapping[str, Any]) -> int | None:
    """L according to a config, at its top level or in the part of its text model."""
    for part in (config, text_part(config)):
        for key in BLOCK_COUNTS:
            if isinstance(part.get(key), int) and not isinstance(part[key], bool) and part[key] < MAX_BLOCKS:
                return part[key]
        if isinstance(part.get(BLOCK_LIST), list):
            return len(part[BLOCK_LIST])
    return None


def files_in(folder: Path, remote: Collection[str]) -> set[str]:
    """Names of a model's files, here and on the hub."""
    return {path.name for path in folder.iterdir()} | set(remote) if folder.is_dir() else set(remote)


def weight_files(folder: Path, present: Collection[str], where: object) -> list[str]:
    """Names of a model's weight files, from the names of all files and the index, which must be in `folder` if there is one.

    Raises CheckpointError if there are two models, none, or a pickled one; if the index is damaged, unsafe, or names a missing file.
    """
    if SINGLE in present and INDEX in present:
        what = f"the folder holds two models, {SINGLE} and {INDEX}: loaders silently take the first"
        raise CheckpointError(what, where=where, fix="delete the one that is out of date")
    if INDEX in present:
        faults, names = Faults(), sorted(set(_weight_map(folder / INDEX).values()))
        for name in names:
            if not re.fullmatch(r"[^/\\\0]+\.safetensors", name):
                what = f"the index names {short(name)}, which is outside its folder or not safetensors"
                faults.add(what, where=f"{where}/{INDEX}", fix="do not use this model")
            elif name not in present:
                faults.add(f"the index names {short(name)}, which is missing", where=where, fix="copy or download the missing file")
        faults.raise_any(CheckpointError)
        return names
    if SINGLE in present:
        return [SINGLE]
    if shards := sorted(name for name in present if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)):
        fix = f"copy {INDEX} too; without it nobody knows whether all shards are here"
        raise CheckpointError(f"there are shards ({shards[0]}, ...) but no index of them", where=where, fix=fix)
    pickles = sorted(name for name in present if name.endswith(PICKLES) and _may_be_weights(name))
    if pickles:
        what = f"the weights are pickled ({', '.join(pickles[:3])}); loading a pickle runs code, so it is never done here"
        fix = "convert them where you trust them: AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)"
        raise CheckpointError(what, where=where, fix=fix)
    others = sorted(name for name in present if name.endswith(OTHER_FORMATS))
    what = f"the weights are not safetensors ({others[0]})" if others else "there are no weights in this folder"
    raise CheckpointError(what, where=where, fix=f"give a folder that holds {SINGLE}, or {INDEX} and its shards")


def _weight_map(index: Path) -> dict[str, str]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError("the index has no weight_map", where=index, fix=AGAIN)
    return names


def _read_headers(folder: Path, remote: Mapping[str, RemoteFile]) -> dict[str, StoredTensor]:
    """The tensors of all weight files. A tensor must lie where the index says, once."""
    present = files_in(folder, remote)
    faults, headers = Faults(), {}
    for name in weight_files(folder, present, folder):
        with faults.collect():
            headers[name] = read_header(folder / name, remote.get(name))
    faults.raise_any(CheckpointError)
    stored = {name: tensor for header in headers.values() for name, tensor in header.items()}
    if INDEX in present:
        promised = _weight_map(folder / INDEX)
        stored_in = {(name, file) for file, header in headers.items() for name in header}
        for name, file in sorted(set(promised.items()) - stored_in)[:5]:
            faults.add(f"the index promises tensor '{name}', which '{file}' does not hold", where=folder / INDEX, fix=DAMAGED_MODEL)
        for name, file in sorted(stored_in - set(promised.items()))[:5]:
            faults.add(f"'{file}' holds tensor '{name}', which the index does not list there", where=folder / INDEX, fix=DAMAGED_MODEL)
    faults.raise_any(CheckpointError)
    masks = {name for name, tensor in stored.items() if name.endswith(".bias") and len(tensor.spec.shape) == 4}
    return {name: tensor for name, tensor in stored.items() if name not in masks and not name.endswith(COMPUTED)}


def text_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a multimodal config that describes the text model."""
    return next((config[key] for key in TEXT_PARTS if isinstance(config.get(key), dict)), {})


def _setting(config: Mapping[str, Any], key: str) -> Any:
    return config.get(key, text_part(config).get(key))


def _without_tied_head(checkpoint: Checkpoint) -> Checkpoint:
    """Leave out a head that is the embedding stored twice: the config says whether it is, or else its class's default does."""
    config, stored = checkpoint.config, checkpoint.tensors
    head = next((name for name in stored if checkpoint.is_head(name) and name.endswith("weight")), None)
    if head is None or config.get("tie_word_embeddings") is False:
        return checkpoint
    same, tied = stored[head].same_bytes(stored[checkpoint.embedding]), config.get("tie_word_embeddings")
    if tied is None:  # what an unknown class says, nobody knows: equal bytes stay one tensor, as its loader may expect
        tied = (resolved(config) or {}).get("tie_word_embeddings", _setting(config, "tie_word_embeddings") or same)
    if tied and not same:
        what = f"the config ties head and embedding, yet '{head}' differs from '{checkpoint.embedding}'"
        fix = "set tie_word_embeddings to false in config.json if the head was trained apart; else save the model again"
        raise CheckpointError(what, where=checkpoint.folder, fix=fix)
    return replace(checkpoint, tensors={name: tensor for name, tensor in stored.items() if name != head}) if tied else checkpoint
