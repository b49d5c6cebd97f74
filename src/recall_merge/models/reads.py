"""What the linear maps of a model read while it runs: those that are modules, and those of the experts of a mixture.

transformers holds the matrices of all experts of a block in one parameter, (E, o, i) or (E, i, o). Each expert's inputs, those of the
tokens that are routed to it, are seen where they are multiplied by its matrix.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from recall_merge.runtime.quiet import quiet

AXES = {"linear": 1, "matmul": 0, "bmm": 0}
"""The functions of torch that multiply inputs by a matrix, and the axis of the matrix along which the inputs run."""


class Map(NamedTuple):
    """A linear map of a model: a parameter, or the matrix in it that belongs to one expert of a mixture."""

    parameter: str  # dotted name
    expert: int | None = None

    def __str__(self) -> str:
        return self.parameter if self.expert is None else f"{self.parameter}.{self.expert}"


@dataclass(frozen=True)
class Read:
    """What a linear map has read in one call; or those of all experts of a mixture at once."""

    map: Map
    axis: int  # of its matrix along which inputs run: 1 for torch's Linear (o, i), 0 for GPT-2's Conv1D (i, o)
    inputs: Tensor  # (.., i); of all experts (E, n, i), zeros where a token is not routed to an expert


See = Callable[[Read, Tensor], None]
"""Takes what a map has read, and what it answers: (.., o), or (E, n, o)."""


def linear_maps(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters that are linear maps, or hold one for each expert of a mixture, by dotted name."""
    return {
        f"{name}.{part}": tuple(parameter.shape)
        for name, module in model.named_modules()
        for part, parameter in module.named_parameters(recurse=False)
        if (part == "weight" if isinstance(module, nn.Linear | Conv1D) else parameter.ndim == 3 and not isinstance(module, _ConvNd))
    }


def record_reads(model: Any, parameters: Collection[str], see: See) -> list[Any]:
    """Call `see` whenever one of these linear maps is used, until all of the handles that are returned are removed.

    Mixtures run their experts one after another from now on.
    """
    handles: list[Any] = []
    for name, module in model.named_modules():
        parts = [part for part, _ in module.named_parameters(recurse=False) if f"{name}.{part}" in parameters]
        if parts and isinstance(module, nn.Linear | Conv1D):
            axis = 1 if isinstance(module, nn.Linear) else 0
            handles.append(module.register_forward_hook(partial(_see_module, f"{name}.weight", axis, see)))
        elif parts:
            running: Any = threading.local()
            handles.append(module.register_forward_pre_hook(partial(_enter, running, {f"{name}.{part}": part for part in parts}, see)))
            handles.append(module.register_forward_hook(partial(_leave, running), always_call=True))
            with quiet():  # it warns where an architecture knows no other way
                model.set_experts_implementation("eager")
    return handles


def _see_module(name: str, axis: int, see: See, _module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    answers = output if isinstance(output, Tensor) else output[-1]  # Llama 4's router: scores, and the answers that they are made of
    see(Read(Map(name), axis, args[0].detach()), answers)


def _enter(running: Any, parts: Mapping[str, str], see: See, module: nn.Module, _: Any) -> None:
    running.mode = _Products({name: getattr(module, part) for name, part in parts.items()}, see)
    running.mode.__enter__()


def _leave(running: Any, *_: Any) -> None:
    if hasattr(running, "mode"):
        running.mode.__exit__(None, None, None)
        del running.mode


class _Products(TorchFunctionMode):
    """Sees products of inputs with parameters that hold a matrix for each expert, or with one of these."""

    def __init__(self, parameters: Mapping[str, Tensor], see: See) -> None:
        super().__init__()
        self._parameters, self._see = parameters, see

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        axis = AXES.get(getattr(func, "__name__", ""))
        if axis is None or len(args) < 2:
            return output
        inputs, matrix = args[:2]
        for name, parameter in self._parameters.items():
            size = parameter[0].numel() * parameter.element_size()
            expert, rest = divmod(matrix.data_ptr() - parameter.data_ptr(), size)
            if 0 <= expert < len(parameter) and not rest and matrix.shape in (parameter.shape, parameter.shape[1:]):
                self._see(Read(Map(name, expert if matrix.ndim == 2 else None), axis, inputs.detach()), output)
        return output
