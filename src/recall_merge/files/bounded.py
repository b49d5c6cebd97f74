"""A model of transformers is built within bounds, whatever its config asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from recall_merge.runtime.errors import CheckpointError

MAX_PARAMETERS = 100_000  # ten times as many as the largest mixtures of experts have
MAX_BYTES = 1 << 28  # of a tensor beside the parameters: as much as a causal mask of 16,384 positions
FILLED = (torch.arange, torch.eye, torch.full, torch.linspace, torch.ones, torch.rand, torch.randn, torch.zeros)
FIX = "put the numbers of the architecture back into config.json"


class Bounded(TorchFunctionMode):
    """On this thread, while a model is built: CheckpointError for too many parameters, and for a large tensor beside them.

    Modules make their large parameters with `torch.empty`, which for an `empty` model makes them on the meta device. The small ones that
    they make with `torch.ones` or `torch.zeros` are discarded afterwards, and buffers, which no file holds, keep the numbers that the model
    computes. `accelerate.init_empty_weights` does the same by replacing `nn.Module.register_parameter` for all threads.
    """

    def __init__(self, folder: Path | str, *, empty: bool = False) -> None:
        super().__init__()
        self._folder, self._empty, self._made = folder, empty, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            self._made += 1
            if self._made > MAX_PARAMETERS:
                what = f"the config asks for more than {MAX_PARAMETERS:,} parameters"
                raise CheckpointError(what, where=self._folder, fix=FIX)
            kwargs |= {"device": "meta"} if self._empty else {}
        elif func in FILLED and "out" not in kwargs:
            like = func(*args, **{**kwargs, "device": "meta"})  # takes no memory
            if like.nbytes > MAX_BYTES and kwargs.get("device") != torch.device("meta"):
                what = f"the config asks for a tensor of {like.numel():,} numbers beside the weights"
                raise CheckpointError(what, where=self._folder, fix=FIX)
        return func(*args, **kwargs)
