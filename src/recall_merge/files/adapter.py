"""A PEFT adapter folder: which of the base's tensors it changes, and by how much, tensor by tensor and exactly.

LoRA (arXiv:2106.09685), rsLoRA (arXiv:2312.03732), DoRA (arXiv:2402.09353), rank and alpha patterns, `modules_to_save`, trained biases,
trained embeddings and single trained tokens. Whatever else an adapter may be is refused by name, never approximated.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from recall_merge.errors import CheckpointError, Faults
from recall_merge.files.checkpoint import Checkpoint, read_json
from recall_merge.files.safetensors import Remote, Stored, read_header

if TYPE_CHECKING:
    from torch import Tensor

    from recall_merge.maths.deltas import Delta

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that alter the base's own weights
UNSUPPORTED = (  # settings of LoRA whose effect is not a change of weights, or not one that a merge could keep
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
_PARTS = re.compile(
    r"^(?P<module>.+?)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector(?:\.weight)?|base_layer\.weight|base_layer\.bias|token_adapter\.trainable_tokens_delta|weight|bias)$"
)


@dataclass
class Edit:
    """How an adapter changes one tensor of the base: put another in its place, add a low-rank product, rescale, set rows."""

    replace: Stored | None = None
    up: Stored | None = None  # B (o, r)
    down: Stored | None = None  # A (r, i)
    scale: float = 1.0  # alpha / r, or alpha / sqrt(r)
    transpose: bool = False  # the base stores this tensor as (in, out), or it is an embedding
    magnitude: Stored | None = None
    rows: Stored | None = None
    row_ids: tuple[int, ...] = ()
    add: Stored | None = None

    @property
    def parts(self) -> list[Stored]:
        return [part for part in (self.replace, self.up, self.down, self.magnitude, self.rows, self.add) if part is not None]

    def shape(self, base: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the edited tensor, which must be the base's unless the expert has another vocabulary."""
        if self.replace is not None:
            return self.replace.spec.shape
        if self.up is not None and self.down is not None:
            product = (self.up.spec.shape[0], self.down.spec.shape[1])
            return product[::-1] if self.transpose else product
        return self.add.spec.shape if self.add is not None else base

    def delta(self, base: Tensor) -> Delta:
        """What this edit adds to `base`, (*s) in float32 or better; as factors if it is nothing but a low-rank product."""
        product = self._product(base.dtype)
        if product is not None and (self.replace, self.magnitude, self.rows) == (None, None, None):
            return product
        return self.apply(base) - base

    def apply(self, base: Tensor) -> Tensor:
        """The edited tensor. `base` is in float32 or better."""
        start = base if self.replace is None else self.replace.read().to(base.dtype)
        edited = start
        product = self._product(base.dtype)
        if product is not None:
            edited = start + product.dense()
        if self.magnitude is not None:  # DoRA: m * (W + dW) / |W + dW|, one magnitude for each output
            outputs = 0 if self.transpose else 1  # the axis that the norm runs over
            magnitude = self.magnitude.read().to(base.dtype).unsqueeze(outputs)
            edited = edited * (magnitude / edited.norm(dim=outputs, keepdim=True))
        if self.rows is not None:
            edited = edited.clone()
            edited[list(self.row_ids)] = self.rows.read().to(base.dtype)
        if self.add is not None:
            edited = edited + self.scale * self.add.read().to(base.dtype)
        return edited

    def _product(self, dtype: Any) -> Any:
        if self.up is None or self.down is None:
            return None
        from recall_merge.maths.deltas import LowRank

        up, down = self.scale * self.up.read().to(dtype), self.down.read().to(dtype)
        return LowRank(down.T, up.T) if self.transpose else LowRank(up, down)


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter, resolved against its base: base tensor name -> edit. Tensors it does not name are the base's own."""

    folder: Path
    config: Mapping[str, Any]
    edits: Mapping[str, Edit] = field(repr=False)

    @property
    def nbytes(self) -> int:
        return sum(part.spec.nbytes for edit in self.edits.values() for part in edit.parts)


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).exists()


def adapter_weights(present: Collection[str], where: object) -> str:
    """The name of an adapter's weight file.

    Raises:
        CheckpointError: if it is not among the files that are present.
    """
    if WEIGHTS in present:
        return WEIGHTS
    pickled = "adapter_model.bin" in present
    raise CheckpointError(
        "the adapter's weights are pickled; loading a pickle runs code" if pickled else f"there is no {WEIGHTS}",
        where=where,
        fix="load it with PEFT where you trust it, and save_pretrained again" if pickled else "copy the whole adapter folder",
    )


def open_adapter(folder: Path, base: Checkpoint, remote: Mapping[str, Remote] = MappingProxyType({})) -> Adapter:
    """Read an adapter's config and header, and find the base tensor behind each of its parts.

    Args:
        remote: file name -> what is known of a weight file that is still on the hub.

    Raises:
        CheckpointError: with every fault: another kind of adapter, pickled or damaged weights, parts that fit no tensor of the base.
    """
    faults = Faults()
    config: dict[str, Any] = {}
    stored: dict[str, Stored] = {}
    with faults.collect():
        config = read_json(folder / CONFIG)
    with faults.collect():
        present = {path.name for path in folder.iterdir()} | set(remote)
        stored = read_header(folder / adapter_weights(present, folder), remote.get(WEIGHTS))
    if config:
        _check_kind(folder, config, faults)
    faults.raise_any(CheckpointError)

    names = _Names(base)
    edits: defaultdict[str, Edit] = defaultdict(Edit)
    for key, part in stored.items():
        with faults.collect():
            _place(key, part, config, names, edits, folder)
    faults.raise_any(CheckpointError)
    for name, edit in edits.items():
        with faults.collect():
            _check_edit(name, edit, base, folder)
    faults.raise_any(CheckpointError)
    return Adapter(folder, config, dict(edits))


def _check_kind(folder: Path, config: Mapping[str, Any], faults: Faults) -> None:
    where = folder / CONFIG
    if (kind := config.get("peft_type")) != "LORA":
        faults.add(f"the adapter is of type {kind}, not LORA", where=where, fix="merge it into its base with PEFT, and give that folder")
        return
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(CHANGES_THE_BASE):
        fix = "save it with PEFT's path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        faults.add(f"the adapter was initialised with {start}, which changes the base's own weights", where=where, fix=fix)
    for key in UNSUPPORTED:
        if config.get(key):
            faults.add(f"the adapter uses `{key}`, which no merge of weights can keep", where=where, fix="train without it")


class _Names:
    """Finds the base tensor that an adapter means; the two may differ by leading words ('transformer.h.0' for 'h.0')."""

    def __init__(self, base: Checkpoint) -> None:
        self.base = base
        self._by_tail: defaultdict[str, list[str]] = defaultdict(list)
        for name in base.tensors:
            parts = name.split(".")
            for start in range(len(parts)):
                self._by_tail[".".join(parts[start:])].append(name)

    def find(self, wanted: str) -> str | None:
        if wanted in self.base.tensors:
            return wanted
        parts = wanted.split(".")
        for start in range(len(parts) - 1):  # the longest tail that the two have in common, if whole on one side
            found = self._by_tail.get(".".join(parts[start:]), [])
            whole = found if start == 0 else [name for name in found if name == ".".join(parts[start:])]
            if len(whole) == 1:
                return whole[0]
        return None

    def tied(self, wanted: str) -> str | None:
        """The embedding, where `wanted` is a head that the base does not store because it is tied."""
        is_head = wanted.endswith(("lm_head.weight", "embed_out.weight"))
        return self.base.embedding if is_head else None


def _place(key: str, part: Stored, config: Mapping[str, Any], names: _Names, edits: dict[str, Edit], folder: Path) -> None:
    match = _PARTS.match(key.removeprefix(PREFIX))
    if match is None:
        raise CheckpointError(
            f"the adapter holds '{key}', which is not part of a LoRA", where=folder / WEIGHTS, fix="merge it with PEFT first"
        )
    module, kind = match["module"], match["part"].removesuffix(".weight") if "lora" in match["part"] else match["part"]
    wanted = f"{module}.{'bias' if kind.endswith('bias') else 'weight'}"
    name = names.find(wanted)
    if name is None and kind == "weight" and (name := names.tied(wanted)):
        existing = edits[name].replace
        if existing is None:
            edits[name].replace = part
        elif not existing.same_bytes(part):
            raise CheckpointError(
                f"the adapter trains the head '{module}' apart from the embedding, to which the base ties it",
                where=folder / WEIGHTS,
                fix="train with ensure_weight_tying=True, or untie the base first",
            )
        return
    if name is None:
        raise CheckpointError(
            f"the adapter changes '{wanted}', which the base does not have", where=folder / WEIGHTS, fix="give the base it was trained on"
        )
    edit = edits[name]
    match kind:
        case "lora_A" | "lora_embedding_A":
            edit.down = part
            edit.scale = _scale(module, config, rank=part.spec.shape[0])
            edit.transpose = kind == "lora_embedding_A" or bool(config.get("fan_in_fan_out"))
        case "lora_B" | "lora_embedding_B":
            edit.up = part
        case "lora_B.bias":
            edit.add = part
            edit.scale = _scale(module, config, rank=None)
        case "lora_magnitude_vector":
            edit.magnitude = part
        case "token_adapter.trainable_tokens_delta":
            edit.rows = part
            edit.row_ids = _token_ids(module, config)
        case _:
            if edit.replace is not None and not edit.replace.same_bytes(part):
                raise CheckpointError(f"the adapter gives '{wanted}' twice, with different values", where=folder / WEIGHTS)
            edit.replace = part


def _scale(module: str, config: Mapping[str, Any], rank: int | None) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA, with the patterns of the config, matched as PEFT does."""

    def pattern(key: str, otherwise: str) -> Any:
        for expression, value in (config.get(key) or {}).items():
            if re.match(rf"(.*\.)?({expression})$", module):
                return value
        return config[otherwise]

    r = pattern("rank_pattern", "r") if rank is None else rank
    return pattern("alpha_pattern", "lora_alpha") / (r**0.5 if config.get("use_rslora") else r)


def _token_ids(module: str, config: Mapping[str, Any]) -> tuple[int, ...]:
    ids = config.get("trainable_token_indices")
    if isinstance(ids, Mapping):
        ids = next((found for layer, found in ids.items() if module.rsplit(".", maxsplit=1)[-1] == layer.split(".")[-1]), None)
    return tuple(ids or ())


def _check_edit(name: str, edit: Edit, base: Checkpoint, folder: Path) -> None:
    where = folder / WEIGHTS
    if (edit.up is None) != (edit.down is None):
        raise CheckpointError(f"the adapter has only one of the two factors of '{name}'", where=where, fix="copy the adapter again")
    shape = base.tensors[name].spec.shape
    if edit.rows is not None and edit.rows.spec.shape != (len(edit.row_ids), *shape[1:]):
        raise CheckpointError(f"the adapter's trained tokens of '{name}' do not fit its config", where=where, fix="copy the adapter again")
    found = edit.shape(shape)
    same_but_rows = name in base.token_tensors and edit.replace is not None and found[1:] == shape[1:]
    if found != shape and not same_but_rows:
        raise CheckpointError(
            f"the adapter changes '{name}' of shape {found}; the base has {shape}", where=where, fix="give the base it was trained on"
        )
