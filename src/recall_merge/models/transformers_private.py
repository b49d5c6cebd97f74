"""The private parts of transformers that recall uses, and nothing else. Checked with transformers 5.23 (tests/test_dependencies.py).

- `conversion_mapping.get_model_conversion_mapping`, `modeling_utils.LoadStateDictConfig`, `PreTrainedModel._get_dtype_plan` and
  `core_model_loading.convert_and_load_state_dict_in_model`: rename, fuse and cast the tensors of one layer and put them into a model whose
  other layers are empty. The public `from_pretrained` does this for whole models only.
- `PreTrainedModel._from_config`: a model of a given class from its config, as the auto classes build theirs.
- `PreTrainedModel._keys_to_ignore_on_load_unexpected`: tensors of a model's files that its class does not read.
- `PreTrainedModel._is_stateful`: the model keeps a state that cannot be cut at a position, as Mamba's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from recall_merge.files.checkpoint import EXTRA_BLOCKS
from recall_merge.runtime.device import is_full
from recall_merge.runtime.errors import CheckpointError
from recall_merge.runtime.quiet import quiet


class TensorLoader:
    """Puts tensors of a model's files, a few at a time, into the model, as `from_pretrained` would put all of them."""

    def __init__(self, model: Any, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._model, self._folder = model, folder
        mapping: Any = get_model_conversion_mapping(model)
        plan = model._get_dtype_plan(dtype)
        self._config = LoadStateDictConfig(dtype=dtype, dtype_plan=plan, weight_mapping=mapping, device_map={"": device})

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put these tensors into the model. Raises CheckpointError if transformers does not expect them, or cannot convert them."""
        with quiet():
            report, _ = convert_and_load_state_dict_in_model(self._model, dict(tensors), self._config)
        if any(is_full(RuntimeError(text)) for text in report.conversion_errors.values()):
            raise torch.OutOfMemoryError(f"out of memory while the parameters of {self._folder} were moved to their device")
        unread = unread_names(self._model)
        report.unexpected_keys = {key for key in report.unexpected_keys if not unread.search(key)}
        for kind in ("unexpected_keys", "mismatched_keys", "conversion_errors", "error_msgs"):
            if wrong := getattr(report, kind):
                raise CheckpointError(f"transformers finds {kind.replace('_', ' ')}: {sorted(map(str, wrong))[:5]}", where=self._folder)


def from_config(model_class: Any, config: Any, dtype: torch.dtype) -> Any:
    """A model of a class of transformers, with new parameters."""
    return model_class._from_config(config, dtype=dtype)


def unread_names(model: Any) -> re.Pattern[str]:
    """The names of tensors that a model's files may hold and its class passes over: blocks that predict further tokens."""
    text = model.config.get_text_config()
    extra = (
        range(text.num_hidden_layers, text.num_hidden_layers + (getattr(text, EXTRA_BLOCKS, 0) or 0)) if hasattr(text, EXTRA_BLOCKS) else ()
    )
    own = [rf"(^|\.)layers\.{number}\." for number in extra]
    return re.compile("|".join([*(model._keys_to_ignore_on_load_unexpected or ()), *own]) or "$^")


def is_stateful(model: PreTrainedModel) -> bool:
    """Whether a model keeps a state that is not a list of keys and values by position."""
    return bool(model._is_stateful)
