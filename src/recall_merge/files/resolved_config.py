"""A config as transformers' class of its architecture reads it: defaults filled in, old spellings understood, derived settings computed."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

from recall_merge.runtime.inert import check_counts, inert_config
from recall_merge.runtime.quiet import quiet

BUILD_LOCK = threading.RLock()  # while transformers builds a model, it changes torch's default dtype for all threads


def resolved(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """All settings of a config.json; None where transformers does not know the architecture, or refuses the config."""
    with quiet():
        try:
            return config_object(config).to_dict()
        except Exception:  # what a config's own checks raise has no common type
            return None


def config_object(config: Mapping[str, Any]) -> Any:
    """A config as transformers makes it from the file; infinity is written as {"__float__": "Infinity"}."""
    from transformers import CONFIG_MAPPING

    check_counts(config)
    read = json.loads(
        json.dumps(inert_config(config)), object_hook=lambda part: float(part["__float__"]) if [*part] == ["__float__"] else part
    )
    return CONFIG_MAPPING[config["model_type"]].from_dict(read)
