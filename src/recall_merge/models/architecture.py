"""A model without its numbers: which module of it holds which parameter, and whether that is a linear map."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recall_merge.models.load import quiet
from recall_merge.runtime.errors import CheckpointError


@dataclass(frozen=True)
class Place:
    """Where a parameter lives in memory.

    Attributes:
        module: the dotted name of its module.
        part: its name there, 'weight' or 'bias' mostly.
        is_linear: the module is a linear map.
        transposed: the map stores its weight as (i, o), as GPT-2's Conv1D does.
    """

    module: str
    part: str
    is_linear: bool
    transposed: bool


def outline(folder: Path) -> list[Place]:
    """The places of all parameters of a folder's model, in its order; those that are tied are named once for each of their names.

    Raises:
        CheckpointError: if transformers does not know the architecture.
    """
    import torch
    from torch import nn
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
    from transformers.pytorch_utils import Conv1D

    try:
        with quiet(), torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            model = architecture(config)
    except (ValueError, OSError, KeyError) as error:
        fix = "only architectures that transformers itself knows can be taken apart; recall never runs code from a checkpoint"
        raise CheckpointError("transformers does not know this model's architecture", where=folder, fix=fix) from error
    modules = dict(model.named_modules())
    places = []
    for name, _ in model.named_parameters(remove_duplicate=False):
        module, _, part = name.rpartition(".")
        kind = modules[module]
        places.append(Place(module, part, isinstance(kind, nn.Linear | Conv1D), isinstance(kind, Conv1D)))
    return places
