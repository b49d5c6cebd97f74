"""Where the tensors of a checkpoint's files go in transformers' own model: the names they get there, and the dtypes.

Versions of transformers have stored the same module under different names, and its loader knows them all. It is asked only where names do
not match, or tensors are cast. The public `from_pretrained` needs the weights, so this uses private parts of transformers 5.23, which
tests/test_dependencies.py checks: `conversion_mapping.get_model_conversion_mapping`, `PreTrainedModel._get_dtype_plan` and `_from_config`,
`core_model_loading.rename_source_key`, `apply_renamings` and `build_glob_alternation`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from copy import deepcopy
from functools import lru_cache
from typing import Any

from recall_merge.files.resolved_config import BUILD_LOCK
from recall_merge.runtime.quiet import quiet

Place = tuple[str, str]
"""A parameter in memory; and the name of the part, where several tensors of the files make one parameter."""


class InMemory:
    """The model of a config, by the class that the config names, on the meta device."""

    def __init__(self, config: Mapping[str, Any], dtype: str) -> None:
        import torch
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, build_glob_alternation

        with BUILD_LOCK, torch.device("meta"):
            model = _class_of(config)._from_config(_config(config), dtype=getattr(torch, dtype))
        mapping: Any = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
        self._prefix, self._dtype, self._state = model.base_model_prefix, getattr(torch, dtype), model.state_dict()
        plan = [*model._get_dtype_plan(self._dtype)]
        self._kept = build_glob_alternation(plan)[0] if plan else None

    def place(self, stored: str) -> Place:
        """Where a tensor of a file goes, as `from_pretrained` finds it."""
        from transformers.core_model_loading import apply_renamings, rename_source_key

        name, converter = rename_source_key(stored, self._renamings, self._converters, self._prefix, self._state)
        if name not in self._state and stored in self._state:
            name, converter = stored, None
        return name, "" if converter is None else apply_renamings(stored, self._renamings)

    def kept_wider(self, names: Iterable[str]) -> set[str]:
        """The tensors that stay in float32 in this model, whatever dtype the others have."""
        import torch

        places = {stored: self.place(stored)[0] for stored in names}
        own = {name for name, tensor in self._state.items() if tensor.dtype == torch.float32 != self._dtype}
        return {stored for stored, place in places.items() if place in own or (self._kept is not None and self._kept.search(place))}


def in_memory(config: Mapping[str, Any], dtype: str = "float32") -> InMemory | None:
    """The model of a config, without numbers; None where transformers does not know the architecture, or refuses the config."""
    return _in_memory(json.dumps(config), dtype)


@lru_cache(maxsize=2)
def _in_memory(config: str, dtype: str) -> InMemory | None:
    with quiet():
        try:
            return InMemory(json.loads(config), dtype)
        except Exception:  # what a model's own checks raise has no common type
            return None


def _config(config: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[config["model_type"]].from_dict(deepcopy(dict(config)))


def _class_of(config: Mapping[str, Any]) -> Any:
    import transformers

    named = [getattr(transformers, name, None) for name in config.get("architectures") or ()]
    known = [kind for kind in named if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)]
    return known[0] if known else transformers.MODEL_FOR_CAUSAL_LM_MAPPING[transformers.CONFIG_MAPPING[config["model_type"]]]
