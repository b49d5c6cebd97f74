"""A config as transformers' class of its architecture reads it: defaults filled in, old spellings understood, derived settings computed."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from recall_merge.runtime.quiet import quiet

BUILD_LOCK = threading.RLock()  # while transformers builds a model, it changes torch's default dtype for all threads


def resolved(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """All settings of a config.json; None where transformers does not know the architecture, or refuses the config."""
    from transformers import CONFIG_MAPPING

    with quiet():
        try:
            return CONFIG_MAPPING[config["model_type"]].from_dict(deepcopy(dict(config))).to_dict()
        except Exception:  # what a config's own checks raise has no common type
            return None
