"""A model without its numbers: its modules, and parameters that take no memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from recall_merge.files.resolved_config import BUILD_LOCK
from recall_merge.models.load import load_config, refused_by_transformers


@dataclass(frozen=True)
class ParameterInfo:
    """A parameter of a model."""

    module: str  # the dotted name of its module
    part: str  # its name there, mostly 'weight' or 'bias'
    is_linear: bool  # the module is a linear map
    transposed: bool  # the map stores its weight as (i, o), as GPT-2's Conv1D does


def outline(folder: Path) -> list[ParameterInfo]:
    """All parameters of a folder's model, in its order. A tied parameter is listed under each of its names. Raises as `empty_model`."""
    return [
        ParameterInfo(name, part, isinstance(module, nn.Linear | Conv1D), isinstance(module, Conv1D))
        for name, module in empty_model(folder).named_modules(remove_duplicate=False)
        for part, _ in module.named_parameters(recurse=False, remove_duplicate=False)
    ]


def empty_model(folder: Path, *, dtype: str = "float32", vocabulary_size: int | None = None) -> Any:
    """The architecture of a folder in evaluation mode. Parameters are on the meta device; buffers have their numbers.

    Raises CheckpointError if transformers does not know the architecture.
    """
    config = load_config(folder, vocabulary_size=vocabulary_size)
    with refused_by_transformers(folder), BUILD_LOCK, _EmptyOnMeta():
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=False).eval()
    discard_parameters(model)
    return model


def discard_parameters(module: nn.Module) -> None:
    """Put the parameters of a module on the meta device, where they take no memory."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)


class _EmptyOnMeta(TorchFunctionMode):
    """`torch.empty` makes tensors on the meta device, on this thread only.

    Modules make their large parameters with it. The small ones that they make with `torch.ones` or `torch.zeros` are discarded afterwards,
    and buffers, which no file holds, keep the numbers that the model computes. `accelerate.init_empty_weights` does the same by
    replacing `nn.Module.register_parameter` for all threads.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})})
