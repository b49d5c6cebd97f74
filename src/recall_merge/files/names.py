"""Where the tensors of a checkpoint's files go in transformers' own model: the names they get there, and the dtypes.

Versions of transformers have stored the same module under different names, and its loader knows them all. It is asked only where names do
not match, or tensors are cast. The public `from_pretrained` needs the weights, so this uses private parts of transformers 5.23, which
tests/test_dependencies.py checks: `conversion_mapping.get_model_conversion_mapping`, `PreTrainedModel._get_dtype_plan` and `_from_config`,
`core_model_loading.rename_source_key`, `build_glob_alternation`, `dot_natural_key` and its operations on tensors.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any

from recall_merge.files.checkpoint import HEADS, Checkpoint
from recall_merge.files.resolved_config import BUILD_LOCK, config_object
from recall_merge.runtime.quiet import quiet

WRAPPERS = re.compile(  # those of torch.compile, activation checkpointing and FSDP; and DistributedDataParallel's
    r"(^|\.)(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?=\.)|^(?:module\.)+"
)
PEFT = re.compile(r"^(?:base_model\.model\.)+")
Place = tuple[str, str]
"""A parameter in memory; and the name of the part, where several tensors of the files make one parameter."""


class InMemory:
    """The model of a config, by the class that the config names, or by that of its text model alone, on the meta device."""

    def __init__(self, config: Mapping[str, Any], dtype: str, *, text: bool) -> None:
        import torch
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, build_glob_alternation

        from recall_merge.files.bounded import Bounded

        kind, its_config = _class_of(config_object(config), text=text)
        with BUILD_LOCK, Bounded("config.json"), torch.device("meta"):
            model = kind._from_config(its_config, dtype=getattr(torch, dtype))
        mapping: Any = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
        self._prefix, self._dtype, self._state = model.base_model_prefix, getattr(torch, dtype), model.state_dict()
        self.parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
        self._turned = {name for name, module in model.named_modules() if getattr(module, "is_transposed", False)}
        self.shared = {name: own for name, own in model.all_tied_weights_keys.items() if not HEADS.search(name)}
        plan = [*model._get_dtype_plan(self._dtype)]
        self._kept = build_glob_alternation(plan)[0] if plan else None

    def place(self, stored: str) -> Place:
        """Where a tensor of a file goes, as `from_pretrained` finds it."""
        from transformers.core_model_loading import rename_source_key

        name, converter = rename_source_key(stored, self._renamings, self._converters, self._prefix, self._state)
        if name not in self._state and stored in self._state:
            name, converter = stored, None
        return name, "" if converter is None else rename_source_key(stored, self._renamings, [])[0]

    def is_transposed(self, parameter: str) -> bool:
        """Whether a parameter holds the matrices of several experts as (in, out), by what its module says."""
        return len(self.parameters[parameter]) == 3 and parameter.rpartition(".")[0] in self._turned

    def made_of(self, stored: Iterable[str]) -> tuple[list[list[str]], Any]:
        """The converter that makes a parameter of tensors of the files, if any; and these in its order, by its patterns."""
        from transformers.core_model_loading import dot_natural_key, rename_source_key

        renamed = {name: rename_source_key(name, self._renamings, [])[0] for name in sorted(stored, key=dot_natural_key)}
        matches = [(rule, name, rule.rename_source_key(renamed[name])[1]) for name in renamed for rule in self._converters]
        if (converter := next((rule for rule, _, pattern in matches if pattern is not None), None)) is None:
            return [list(renamed)], None
        groups = [[name for rule, name, each in matches if rule is converter and each == pattern] for pattern in converter.source_patterns]
        return [group for group in groups if group], converter

    def by_name(self, names: Iterable[str]) -> dict[str, str]:
        """The tensors of the files by their names in memory, where they are whole parameters; a shared one has several."""
        found = {place: stored for stored in names for place, part in [self.place(stored)] if not part and place in self._state}
        return found | {name: found[own] for name, own in self.shared.items() if own in found}

    def kept_wider(self, names: Iterable[str]) -> set[str]:
        """The tensors that stay in float32 in this model, whatever dtype the others have."""
        import torch

        places = {stored: self.place(stored)[0] for stored in names}
        own = {name for name, tensor in self._state.items() if tensor.dtype == torch.float32 != self._dtype}
        return {stored for stored, place in places.items() if place in own or (self._kept is not None and self._kept.search(place))}


def in_memory(config: Mapping[str, Any], dtype: str = "float32", *, text: bool = False) -> InMemory | None:
    """The model of a config, without numbers; None where transformers does not know the architecture, or refuses the config."""
    return _in_memory(json.dumps(config), dtype, text)


@lru_cache(maxsize=2)
def _in_memory(config: str, dtype: str, text: bool) -> InMemory | None:
    with quiet():
        try:
            return InMemory(json.loads(config), dtype, text=text)
        except Exception:  # what a model's own checks raise has no common type
            return None


class Names:
    """Finds the base tensor that a module's name means; the two may differ by leading words ('transformer.h.0' for 'h.0')."""

    def __init__(self, base: Checkpoint) -> None:
        self._base = base
        self._by_tail: defaultdict[str, list[str]] = defaultdict(list)
        for name in base.tensors:
            parts = name.split(".")
            for start in range(len(parts)):
                self._by_tail[".".join(parts[start:])].append(name)

    def find(self, wanted: str) -> str | None:
        """The name in the base's files, or None if there is none, or more than one that may be meant."""
        return self._find(wanted) or self._in_memory.get(wanted)

    def _find(self, wanted: str) -> str | None:
        if wanted in self._base.tensors:
            return wanted
        if candidates := self._by_tail.get(wanted, []):
            return candidates[0] if len(candidates) == 1 else None
        parts = wanted.split(".")
        tails = (".".join(parts[start:]) for start in range(1, len(parts) - 1))  # the longest tail that is a whole name
        return next((tail for tail in tails if tail in self._base.tensors), None)

    @cached_property
    def models(self) -> list[InMemory]:
        """The base's model in memory, and its text model alone, as far as transformers knows them."""
        both = (in_memory(self._base.config, text=text) for text in (False, True))
        return [model for model in both if model is not None]

    @cached_property
    def _in_memory(self) -> Mapping[str, str]:
        """The base's tensors by their names in memory, which transformers may have changed since the files were written."""
        both = (in_memory(self._base.config, text=text) for text in (False, True))
        whole, text_alone = ({} if model is None else model.by_name(self._base.tensors) for model in both)
        return {name: stored for name, stored in {**whole, **text_alone}.items() if whole.get(name, stored) == stored}

    def are_shared(self, one: str, other: str) -> bool:
        """Whether two modules of the model have one weight."""
        names = [f"{module}.weight" for module in (one, other)]
        return one != other and any(len({model.shared.get(name, name) for name in names}) == 1 for model in self.models)

    def is_tied_head(self, wanted: str) -> bool:
        """Whether `wanted` is a head that the base does not store because it is tied to the embedding."""
        return HEADS.search(wanted) is not None and self._base.is_tied


def unwrapped(name: str) -> str:
    """The name that a module has in the model itself, without what compilers, parallel training and PEFT put around it.

    >>> unwrapped("module.base_model.model._orig_mod.model.layers.0.self_attn.q_proj.weight")
    'model.layers.0.self_attn.q_proj.weight'
    """
    bare = WRAPPERS.sub("", name).lstrip(".")
    inner = PEFT.sub("", bare)
    return name if inner == name else unwrapped(inner)


def renamed_like(checkpoint: Checkpoint, base: Checkpoint) -> Checkpoint:
    """The checkpoint with the base's names, where transformers loads both names into the same parameter. Else as it is."""
    others = [name for name in checkpoint.tensors if name not in base.tensors]
    if not others or checkpoint.config.get("model_type") != base.config.get("model_type"):
        return checkpoint
    if (model := in_memory(base.config)) is None:
        return checkpoint
    by_place = {model.place(name): name for name in base.tensors}
    names = {name: by_place.get(model.place(name), name) if name in others else name for name in checkpoint.tensors}
    if len(set(names.values())) < len(names):  # two tensors for one place: neither is taken, and the check names them
        return checkpoint
    tensors = {names[name]: tensor for name, tensor in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=tensors, layers=base.layers)


def _class_of(config: Any, *, text: bool) -> tuple[Any, Any]:
    """The class of a config's model, and the config that it takes: the one that it names; or, for `text`, that of its text alone."""
    import transformers

    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    known = [kind for kind in named if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)]
    found: Any = known[0] if known and not text else transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return found, config if issubclass(found.config_class, type(config)) else config.get_text_config()
