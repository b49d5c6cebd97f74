"""A model's configs as other libraries may read them: without what makes them fetch, import or run something.

transformers asks the hub for attention and experts' kernels that a config names, patches its classes (fusions), takes weights from another
file than a loader expects, and hands the arguments of a vision tower to timm, which fetches and unpickles. Tokenizers open the files that
their config names, wherever these lie. Whatever gate a library has of its own, none of this reaches it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from recall_merge.runtime.errors import CheckpointError, short

IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal)?")
BUILT_IN = (None, "eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm")  # implementations that come with transformers
ACTS = ("use_kernels", "kernel_config", "fusion_config", "distributed_config", "transformers_weights", "quantization_config")
MAX_LABELS = 100_000
COUNTED = re.compile(r"(num|n|moe_num)_(\w+_)?(layers?|blocks?|experts?|heads?|groups?|stages?)|\w+_layers|depth|layers?")
MAX_COUNT = 10_000
OF_TIMM = re.compile(r"checkpoint|pretrained")  # arguments of a tower that name weights
NAMES_TIMM = ("architecture", "backbone")  # with a ':' or '/' they name a repository or a folder
OPENED = re.compile(r".*_file|init_inputs|gguf_file|tokenizer_object|tokenizer_type|slow_tokenizer")  # keys of a tokenizer's config


def inert_config(config: Any, *, local: bool = False) -> Any:
    """A config, at all its levels, without what acts; `local` leaves implementations of packages that its reader may have installed.

    >>> inert_config({"attn_implementation": "org/kernel", "text_config": {"_attn_implementation": "eager", "use_kernels": True}})
    {'text_config': {'_attn_implementation': 'eager'}}
    """
    if isinstance(config, list):
        return [inert_config(part, local=local) for part in config]
    if not isinstance(config, dict):
        return config
    return {key: inert_config(value, local=local) for key, value in config.items() if not _acts(key, value, local)}


def _acts(key: str, value: Any, local: bool) -> bool:
    if IMPLEMENTATION.fullmatch(key):
        names = value.values() if isinstance(value, dict) else [value]
        return not all(name in BUILT_IN or (local and isinstance(name, str) and name.isidentifier()) for name in names)
    if key == "model_args" and isinstance(value, dict):
        return any(map(OF_TIMM.search, value))
    if key == "num_labels":  # of classifiers; transformers makes a dictionary of so many entries
        return not isinstance(value, int) or value > MAX_LABELS
    named = key in NAMES_TIMM and isinstance(value, str) and re.search(r"[:/\\]", value) is not None
    return named or (key in ACTS and value is not None)


def check_counts(config: Mapping[str, Any], where: object = "") -> None:
    """Raises CheckpointError for a config with more blocks, experts or heads than any model has: transformers would make lists of them."""
    for key, value in config.items():
        if isinstance(value, dict):
            check_counts(value, where)
        elif COUNTED.fullmatch(key) and isinstance(value, int | float) and value > MAX_COUNT:
            fix = "put the number of the architecture back into config.json"
            raise CheckpointError(f"the config says `{key}`: {short(value)}; no model has so many", where=where, fix=fix)


def inert_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's config without paths: the names of its files are known."""
    versions = config.get("fast_tokenizer_files") or []
    paths = not isinstance(versions, list) or any(not isinstance(name, str) or PurePath(name).name != name for name in versions)
    return {key: value for key, value in config.items() if not OPENED.fullmatch(key) and not (paths and key == "fast_tokenizer_files")}
