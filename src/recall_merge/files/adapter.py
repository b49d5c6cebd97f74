"""A PEFT adapter folder: which tensors of the base it changes, and by how much, exactly.

LoRA (arXiv:2106.09685), rsLoRA (arXiv:2312.03732), DoRA (arXiv:2402.09353), rank and alpha patterns, `modules_to_save`, trained biases,
trained embeddings, single trained tokens, experts that are one parameter; in the words of PEFT, of what trainers wrap around modules,
and of Tinker. All other kinds are refused by name, never approximated.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from recall_merge.files.checkpoint import INDEX, SAVE_WHOLE, SINGLE, Checkpoint, check_below, files_in, read_json
from recall_merge.files.edits import COPY_AGAIN, MERGE_FIRST, OTHER_BASE, Edit, Factor
from recall_merge.files.fused import TargetParameters
from recall_merge.files.links import check_links
from recall_merge.files.names import Names, unwrapped
from recall_merge.files.promised import Promises
from recall_merge.files.safetensors import RemoteFile, StoredTensor, read_header
from recall_merge.files.tinker import MAKE_WHOLE, Tinker, is_tinkers
from recall_merge.runtime.errors import CheckpointError, Faults, short

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
ADAPTER_NAME = re.compile(  # that of a state which was not saved by PEFT
    r"\.(lora_(?:embedding_)?[AB]|lora_magnitude_vector|modules_to_save|original_module|trainable_tokens_delta)\.default(?=\.|$)"
)
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that alter the base's own weights
UNSUPPORTED = (  # settings of LoRA that do more than change single tensors
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "megatron_config", "monteclora_config",
    "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
CONV1D = ("gpt2", "openai-gpt")  # model types whose blocks hold transformers' Conv1D, which stores (in, out)
MAX_PATTERN = 10_000  # characters; a pattern that lists every module of a large model has some thousands
PATIENCE = 1.0  # seconds; a sound pattern takes microseconds
LARGEST = 1e9  # rank or alpha
_PARTS = re.compile(
    r"^(?P<module>.+?)\.(?P<copy>modules_to_save\.|original_module\.)?(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A"
    r"|lora_embedding_B|lora_magnitude_vector(?:\.weight)?|base_layer\.weight|base_layer\.bias|token_adapter\.trainable_tokens_delta"
    r"|weight|bias)$"
)


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter and its edits of the base, by the base's tensor names. Tensors without an edit stay the base's."""

    folder: Path
    config: Mapping[str, Any]
    edits: Mapping[str, Edit] = field(repr=False)

    @property
    def nbytes(self) -> int:
        return sum(part.spec.nbytes for edit in self.edits.values() for part in edit.parts)


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).exists()


def adapter_weights(present: Collection[str], where: object) -> str:
    """The name of an adapter's weight file. Raises CheckpointError if it is not among the files that are present."""
    if WEIGHTS in present:
        return WEIGHTS
    if "adapter_model.bin" in present:
        fix = "load it with PEFT where you trust it, and save_pretrained again"
        raise CheckpointError("the adapter's weights are pickled; loading a pickle runs code", where=where, fix=fix)
    raise CheckpointError(f"there is no {WEIGHTS}", where=where, fix="copy the whole adapter folder")


def open_adapter(folder: Path, base: Checkpoint, remote: Mapping[str, RemoteFile] = MappingProxyType({})) -> Adapter:
    """Read an adapter's config and header, and find the tensor of the base that each of its parts changes. `remote`: files on the hub.

    Raises CheckpointError with every fault: another kind of adapter, pickled or damaged weights, parts that do not fit the base.
    """
    faults, config, stored = Faults(), {}, {}
    with faults.collect():
        config = read_json(folder / CONFIG)
        check_links(folder)
        _check_config(folder, config, faults)
    present = files_in(folder, remote)
    if not present & {WEIGHTS, "adapter_model.bin"}:
        check_below(folder)
    if whole := present & {SINGLE, INDEX}:
        fix = f"move one of the two to a folder of its own: {whole.pop()} and its config, or {CONFIG} and {WEIGHTS}"
        faults.add("the folder holds a whole model and an adapter: which of them is meant?", where=folder, fix=fix)
    with faults.collect():
        stored = read_header(folder / adapter_weights(present, folder), remote.get(WEIGHTS))
        if not stored:
            raise CheckpointError("the adapter's file holds no tensors", where=folder / WEIGHTS, fix=SAVE_WHOLE)
    faults.raise_any(CheckpointError)

    parts = _Parts(folder, config, base, unknown=f"{OTHER_BASE}; or {MAKE_WHOLE}" if is_tinkers(stored) else OTHER_BASE)
    tinker = Tinker(base, parts.names, parts.scale, rank=config["r"], where=folder / WEIGHTS)
    stored, parts.joined = tinker.translated(stored, faults)
    for key, part in stored.items():
        with faults.collect():
            parts.place(key, part)
    faults.raise_any(CheckpointError)
    parts.check(faults)
    faults.raise_any(CheckpointError)
    return Adapter(folder, config, dict(parts.edits))


def changes_nothing(adapter: Adapter) -> bool:
    """Whether all it adds are products with a factor of zeros, as before training. The first that is not zero ends the search."""
    stored = any(part.remote for edit in adapter.edits.values() for part in edit.parts)
    return not stored and not any(
        not edit.is_product or (edit.up is not None and edit.down is not None and edit.up.read().any() and edit.down.read().any())
        for edit in adapter.edits.values()
    )


def _check_config(folder: Path, config: Mapping[str, Any], faults: Faults) -> None:
    import regex

    where = folder / CONFIG
    if (kind := config.get("peft_type")) != "LORA":
        faults.add(f"the adapter is of type {kind}, not LORA", where=where, fix=MERGE_FIRST)
        return
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(CHANGES_THE_BASE):
        fix = "save it with PEFT's path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        if is_adapter(plain := folder / "pissa_converted"):
            fix = f"give the plain LoRA that LLaMA-Factory has made of it: {plain}"
        faults.add(f"the adapter was initialised with {start}, which changes the base's own weights", where=where, fix=fix)
    for key in UNSUPPORTED:
        if config.get(key):
            what = f"the adapter uses `{key}`, which is more than a change of the base's tensors one by one"
            faults.add(what, where=where, fix=MERGE_FIRST)
    if config.get("nvfp4_merge_aware"):  # which axolotl writes, and PEFT passes over
        what = "the adapter was trained for the rounding of its NVFP4 base, `nvfp4_merge_aware`: it is no change of other weights"
        faults.add(what, where=where, fix="merge it into that base with `axolotl merge-lora`, and dequantise the result")
    for key in ("target_modules", "exclude_modules", "target_parameters", "modules_to_save"):
        names = config.get(key) or ()
        one = isinstance(names, str) and key.endswith("_modules")
        if not one and not (isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)):
            faults.add(f"`{key}` of the adapter is {short(names)}, not a list of names", where=where, fix=COPY_AGAIN)
    numbers = {key: config.get(key) for key in ("r", "lora_alpha")}
    for pattern in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(pattern) or {}
        numbers |= {f"{pattern}.{key}": value for key, value in patterns.items()} if isinstance(patterns, dict) else {pattern: patterns}
        for key in patterns if isinstance(patterns, dict) else ():
            try:
                if len(key) > MAX_PATTERN:
                    faults.add(f"`{pattern}` of the adapter holds a pattern of {len(key):,} characters", where=where, fix=COPY_AGAIN)
                else:
                    regex.compile(_whole_name(key))
            except (regex.error, RecursionError) as error:
                faults.add(f"`{pattern}` of the adapter holds {short(key)}, which is not a pattern: {error}", where=where, fix=COPY_AGAIN)
    for key, value in numbers.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < LARGEST:
            faults.add(f"`{key}` of the adapter is {short(value)}, not a number above 0", where=where, fix=COPY_AGAIN)


class _Parts:
    """Turns an adapter's stored parts into edits of the base's tensors."""

    def __init__(self, folder: Path, config: Mapping[str, Any], base: Checkpoint, unknown: str = OTHER_BASE) -> None:
        self.edits: defaultdict[str, Edit] = defaultdict(Edit)
        self.joined: dict[str, Edit] = {}  # those of tensors that several parts change together
        self._where = folder / WEIGHTS
        self._config = config
        self._base = base
        self._unknown = unknown  # the fix for parts that the base does not have
        self.names = Names(base)
        self._parameters = TargetParameters(config, self.names, base, self._where)
        self._head: dict[str, StoredTensor] = {}  # parts by kind for a head that the base ties
        self._trained_whole: set[str] = set()
        self._placed: dict[tuple[str, str], tuple[str, StoredTensor]] = {}  # by tensor and kind: of which module
        self._modules: dict[str, str] = {}  # those with factors, and the base's tensor of each

    def place(self, key: str, part: StoredTensor) -> None:
        match = _PARTS.match(ADAPTER_NAME.sub(r".\1", unwrapped(key)))
        if match is None:
            raise CheckpointError(f"the adapter holds '{key}', which is not part of a LoRA", where=self._where, fix=MERGE_FIRST)
        if part.spec.shape == (0,):
            raise CheckpointError(f"the adapter's '{key}' is empty", where=self._where, fix=SAVE_WHOLE)
        if "lora_" in match["part"] and len(part.spec.shape) > 2:
            what = f"the adapter changes the convolution '{match['module']}', by factors of {len(part.spec.shape)} dimensions"
            raise CheckpointError(what, where=self._where, fix=MERGE_FIRST)
        if match["copy"] == "original_module.":  # the base's own tensor, kept aside; `bias="all"` stores it too
            return
        module, kind = match["module"], match["part"].removesuffix(".weight") if "lora" in match["part"] else match["part"]
        if self._parameters.take(module, kind, part):
            return
        wanted = f"{module}.{'bias' if kind.endswith('bias') else 'weight'}"
        name = self.names.find(wanted)
        if name is not None and "lora" in kind:
            self._modules[module] = name
        if name is None and self.names.is_tied_head(wanted):
            self._head[kind] = part
            return
        if name is None and kind == "lora_B.bias":
            what = f"the adapter adds a bias to '{module}', which has none in the base"
            raise CheckpointError(what, where=self._where, fix="train without `lora_bias`")
        if name is None:
            raise CheckpointError(f"the adapter changes '{wanted}', which the base does not have", where=self._where, fix=self._unknown)
        self._put(self.edits[name], name, module, kind, part)

    def _put(self, edit: Edit, name: str, module: str, kind: str, part: StoredTensor) -> None:
        slot = kind.removeprefix("base_layer.").replace("embedding_", "")
        other, placed = self._placed.setdefault((name, slot), (module, part))
        if not placed.same_bytes(part):
            if self.names.are_shared(other, module):
                what = f"the adapter changes '{other}' and '{module}' apart, which are one tensor in the base"
                raise CheckpointError(what, where=self._where, fix="train one of them only, as `layers_to_transform` of PEFT's config says")
            raise CheckpointError(f"the adapter gives '{name}' twice, with different values", where=self._where, fix=COPY_AGAIN)
        match kind:
            case "lora_A" | "lora_embedding_A":
                edit.down = part
                edit.scale = self.scale(module, rank=part.spec.shape[0] if part.spec.shape else 0)
                edit.transpose = kind == "lora_embedding_A"
            case "lora_B" | "lora_embedding_B":
                edit.up = part
            case "lora_B.bias":
                edit.add = part
                edit.scale = self.scale(module, rank=None)
            case "lora_magnitude_vector":
                edit.magnitude = part
            case "token_adapter.trainable_tokens_delta":
                edit.rows = part
                edit.row_ids = self._token_ids(module)
            case _:
                edit.replace = part
                if not kind.startswith("base_layer"):
                    self._trained_whole.add(name)

    def check(self, faults: Faults) -> None:
        """Find edits that do not fit, once all parts are placed; drop edits that change nothing."""
        parameters = self._parameters.edits(self.scale, faults) | self.joined
        for name in sorted(parameters.keys() & self.edits.keys())[:3]:
            faults.add(f"the adapter changes '{name}' twice, in two ways", where=self._where, fix=MERGE_FIRST)
        self.edits |= parameters
        for name, edit in list(self.edits.items()):
            own = self._base.tensors[name]
            if edit.replace is not None and name not in self._trained_whole and edit.replace.same_bytes(own):
                edit.replace = None  # PEFT stores the base's own tensor beside a trained embedding
            if not edit.parts:
                del self.edits[name]
                continue
            if not edit.transpose and name not in parameters:
                edit.transpose = self._is_stored_transposed(name, edit)
            for misfit in edit.misfits(own.spec.shape, tokens=name in self._base.token_tensors):
                faults.add(f"the adapter changes '{name}' {misfit}", where=self._where, fix=OTHER_BASE)
        placed = {*self._placed, *((name, "lora_A") for name in parameters)}
        for what, fix in Promises(self._config, self._base, self.names, self._is_all).broken(self._modules, placed):
            faults.add(what, where=self._where, fix=fix)
        if self._base.is_tied and not self._head_follows():
            what = f"the adapter trains the head apart from the embedding '{self._base.embedding}', to which the base ties it"
            faults.add(what, where=self._where, fix="train both with `ensure_weight_tying=True`, or untie the base first")

    def _is_stored_transposed(self, name: str, edit: Edit) -> bool:
        """Whether the base stores a tensor as (in, out). PEFT asks the module's class; the shape decides unless it is square."""
        if edit.up is None or edit.down is None or edit.up.spec.shape[:1] == edit.down.spec.shape[1:]:
            return self._base.config.get("model_type") in CONV1D and 0 < self._base.layers.of(name) < self._base.layers.last
        return edit.down.spec.shape[1:] + edit.up.spec.shape[:1] == self._base.tensors[name].spec.shape

    def _head_follows(self) -> bool:
        """Whether the adapter changes a tied head and its embedding in the same way."""
        embedding = self._base.embedding
        edit = self.edits.get(embedding, Edit())
        own = edit.replace or self._base.tensors[embedding]
        if embedding in self._trained_whole and "weight" not in self._head:
            return False
        ours = {"weight": edit.replace, "base_layer.weight": own, "token_adapter.trainable_tokens_delta": edit.rows}
        factors = {"lora_A": edit.up, "lora_B": edit.down}
        return all(
            ((same := ours.get(kind)) is not None and part.same_bytes(same))
            or ((factor := factors.get(kind)) is not None and _is_transpose(part, factor))
            for kind, part in self._head.items()
        )

    def scale(self, module: str, rank: int | None) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA, with the patterns of the config, matched as PEFT does."""

        def pattern(key: str, otherwise: str) -> Any:
            matching = (value for expression, value in (self._config.get(key) or {}).items() if self._matches(expression, module))
            return next(matching, self._config[otherwise])

        r = pattern("rank_pattern", "r") if rank is None else rank
        if not r:
            raise CheckpointError(f"the adapter's factors of '{module}' are of rank 0", where=self._where, fix=COPY_AGAIN)
        return pattern("alpha_pattern", "lora_alpha") / (r**0.5 if self._config.get("use_rslora") else r)

    def _matches(self, expression: str, module: str) -> bool:
        """Whether a pattern of ranks or alphas means a module, as PEFT decides it."""
        return self._is_all(_whole_name(expression), module, told=expression)

    def _is_all(self, expression: str, module: str, told: str | None = None) -> bool:
        """Whether an expression matches all of a name; one that takes too long is refused."""
        import regex

        try:
            return regex.fullmatch(expression, module, timeout=PATIENCE) is not None
        except (regex.error, RecursionError) as error:
            what = f"the adapter's pattern {short(expression)} is none: {error}"
            raise CheckpointError(what, where=self._where.with_name(CONFIG), fix=COPY_AGAIN) from None
        except TimeoutError:
            what = f"the adapter's pattern {short(told or expression)} takes too long to match"
            raise CheckpointError(what, where=self._where.with_name(CONFIG), fix="write the modules' names instead") from None

    def _token_ids(self, module: str) -> tuple[int, ...]:
        ids = self._config.get("trainable_token_indices")
        if isinstance(ids, Mapping):
            ids = next((tokens for name, tokens in ids.items() if f".{module}".endswith(f".{name}")), None)
        if not isinstance(ids, list) or not all(isinstance(row, int) for row in ids):
            what = f"`trainable_token_indices` of the adapter lists no tokens for '{module}'"
            raise CheckpointError(what, where=self._where.with_name(CONFIG), fix=COPY_AGAIN)
        return tuple(ids)


def _whole_name(expression: str) -> str:
    """A pattern as PEFT applies it: to the whole of a module's name, or to what follows one of its dots."""
    return rf"(.*\.)?({expression})$"


def _is_transpose(part: StoredTensor, factor: Factor) -> bool:
    """Whether two stored factors are each other's transpose; for files that are still on the hub, the shapes decide."""
    if part.spec.shape != factor.spec.shape[::-1]:
        return False
    return part.remote is not None or factor.remote is not None or part.read().equal(factor.read().T)
