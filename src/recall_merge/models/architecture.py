"""A model without its numbers: its modules, and parameters that take no memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.pytorch_utils import Conv1D

from recall_merge.files.bounded import Bounded
from recall_merge.files.inert_folder import GENERATION
from recall_merge.files.resolved_config import BUILD_LOCK
from recall_merge.maths.layers import Layers
from recall_merge.models.hidden_states import COMPARE_NOTHING, before_first, find_blocks
from recall_merge.models.load import load_config, model_class, refused_by_transformers
from recall_merge.models.transformers_private import from_config
from recall_merge.runtime.errors import CheckpointError
from recall_merge.runtime.quiet import quiet


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


def empty_model(folder: Path, *, dtype: str = "float32", vocabulary_size: int | None = None, device: torch.device | None = None) -> Any:
    """The architecture of a folder in evaluation mode. Parameters are on the meta device; buffers have their numbers, on `device`.

    Raises CheckpointError if transformers does not know the architecture.
    """
    config = load_config(folder, vocabulary_size=vocabulary_size)
    with refused_by_transformers(folder), BUILD_LOCK:
        architecture, config = model_class(config)
        with Bounded(folder, empty=True):
            model = from_config(architecture, config, getattr(torch, dtype)).eval()
    discard_parameters(model)
    for part in model.modules() if device is not None else ():
        for name, buffer in part._buffers.items():
            part._buffers[name] = buffer if buffer is None else buffer.to(device)
    return model


def check_loads(folder: Path) -> None:
    """Check, without weights, that transformers takes the configs of a folder. Raises CheckpointError with the reason."""
    empty_model(folder)
    if (folder / GENERATION).is_file():
        with refused_by_transformers(folder):
            GenerationConfig.from_pretrained(folder)


def check_blocks(folder: Path, layers: Layers) -> None:
    """Check, without weights, that hidden states can be compared: transformers builds the model, and its blocks take texts one by one.

    Raises CheckpointError with the reason.
    """
    model = empty_model(folder)
    blocks = find_blocks(model, layers)
    _replace_parameters(model, lambda parameter: torch.zeros((), dtype=parameter.dtype).expand(parameter.shape))
    discard_parameters(blocks)
    shapes: list[tuple[int, ...]] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shapes.append(tuple(before_first(args, kwargs).shape))
        raise _Enough

    blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.inference_mode(), quiet():
            model(input_ids=torch.zeros(2, 3, dtype=torch.long), attention_mask=torch.ones(2, 3, dtype=torch.long), use_cache=False)
        what = "does not reach them from text alone"
    except _Enough:
        if len(shapes[0]) == 4 or shapes[0][:2] == (2, 3):
            return
        what = f"hands them hidden states of shape {shapes[0]} for 2 texts of 3 tokens"
    except Exception as error:  # whatever the code of an architecture raises
        what = f"does not reach them from text alone: {(str(error) or type(error).__name__).splitlines()[0]}"
    raise CheckpointError(f"its blocks cannot be compared: {type(model).__name__} {what}", where=folder, fix=COMPARE_NOTHING)


def discard_parameters(module: nn.Module) -> None:
    """Put the parameters of a module on the meta device, where they take no memory."""
    _replace_parameters(module, lambda parameter: parameter.detach().to("meta"))


def _replace_parameters(module: nn.Module, new: Callable[[Tensor], Tensor]) -> None:
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(new(parameter), requires_grad=False)


class _Enough(Exception):
    """Raised inside a forward pass that has reached the blocks."""
