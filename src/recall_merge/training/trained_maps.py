"""The linear maps of a model that is being trained: how each has changed since training began, and how a penalty on that pulls it back."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from recall_merge.files.checkpoint import Checkpoint
from recall_merge.files.names import Names, unwrapped
from recall_merge.maths.deltas import Dense, LowRank
from recall_merge.maths.moments import Moment
from recall_merge.maths.protection import dense_pull, pull


class TrainedMap(Protocol):
    """A linear map W (o, i) that has changed by D."""

    def weight(self) -> Dense:
        """W as training began."""
        ...

    def change(self) -> LowRank | Dense:
        """D so far."""
        ...

    def add_pull(self, moment: Moment, factor: float) -> Tensor:
        """Add `factor` times the gradients of tr(D S D^T) to those of the parameters; `moment` is S.    -> tr(D S D^T)"""
        ...


def trained_maps(model: nn.Module, base: Checkpoint, tensors: Collection[str]) -> dict[str, TrainedMap]:
    """The maps that are trained, by the names of their tensors in the base's files, as far as these are among `tensors`.

    Call it before the first step, or where training goes on, before the model gets back what it had learnt.
    """
    from peft.tuners.lora import LoraLayer

    names, found = Names(base), dict[str, TrainedMap]()
    for name, module in model.named_modules():
        is_adapter = isinstance(module, LoraLayer)
        inner: Any = module.base_layer if is_adapter else module
        if not isinstance(inner, nn.Linear | Conv1D) or (not is_adapter and not inner.weight.requires_grad):
            continue
        stored = names.find(f"{unwrapped(name)}.weight")
        if stored is None or stored not in tensors:
            continue
        if not is_adapter:
            found[stored] = _Full(inner)
        elif len(module.lora_A):
            found[stored] = _Dora(module) if any(module.use_dora.values()) else _Lora(module)
    return found


class Adapted:
    """A module and its one adapter, s B A."""

    def __init__(self, layer: Any) -> None:
        [self.adapter] = layer.lora_A
        self.scale = layer.scaling[self.adapter]
        self.down, self.up = layer.lora_A[self.adapter].weight, layer.lora_B[self.adapter].weight
        self.inner: Any = layer.base_layer

    def begin(self, directions: Tensor) -> None:
        """Let the first rows of A lie along directions of length 1, each as long as its rows are on average."""
        with torch.no_grad():
            self.down[: len(directions)] = directions.to(self.down) * self.down.norm(dim=1).mean()


class _Lora(Adapted):
    """W + s B A."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self.start = None if not self.up.any() else (self.up.detach().clone(), self.down.detach().clone())

    def weight(self) -> Dense:
        inner = _oriented(self.inner)
        return inner if self.start is None else inner + self.scale * (self.start[0] @ self.start[1])

    def change(self) -> LowRank:
        up, down = self.up.detach().float(), self.down.detach().float()
        if self.start is None:
            return LowRank(self.scale * up, down)
        return LowRank(self.scale * torch.cat([up, -self.start[0]], dim=1).float(), torch.cat([down, self.start[1]]).float())

    def add_pull(self, moment: Moment, factor: float) -> Tensor:
        found, rank = pull(self.change(), moment), len(self.down)
        add_gradient(self.up, factor * self.scale * found.up[:, :rank])
        add_gradient(self.down, factor * found.down[:rank])
        return found.energy


class _Full:
    """All weights, which costs a product of W's size with the moment's directions in each step."""

    def __init__(self, module: Any) -> None:
        self.module, self.start = module, module.weight.detach().clone()

    def weight(self) -> Dense:
        return _oriented(self.module, self.start)

    def change(self) -> Dense:
        return _oriented(self.module).float() - self.weight().float()

    def add_pull(self, moment: Moment, factor: float) -> Tensor:
        energy, gradient = dense_pull(self.change(), moment)
        add_gradient(self.module.weight, factor * (gradient.mT if isinstance(self.module, Conv1D) else gradient))
        return energy


class _Dora(Adapted):
    """m / |W + s B A| (W + s B A), by rows; the norms count as constants, as they do in PEFT's own gradients."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        self.size = layer.lora_magnitude_vector[self.adapter].weight
        self.start = self._now()[1].clone() if self.up.any() else None

    def weight(self) -> Dense:
        return _oriented(self.inner) if self.start is None else self.start

    def change(self) -> Dense:
        return self._now()[1] - self.weight().float()

    def _now(self) -> tuple[Tensor, Tensor, Tensor]:
        """W + s B A and the map (o, i); and 1 / |W + s B A| (o, 1)."""
        inner = _oriented(self.inner).float()
        summed = torch.addmm(inner, self.up.detach().float(), self.down.detach().float(), alpha=self.scale)
        inverse = 1 / summed.norm(dim=1, keepdim=True)
        return summed, summed * (self.size.detach().float().reshape(-1, 1) * inverse), inverse

    def add_pull(self, moment: Moment, factor: float) -> Tensor:
        summed, now, inverse = self._now()
        energy, gradient = dense_pull(now - self.weight().float(), moment)
        gradient = factor * gradient
        add_gradient(self.size, ((gradient * summed).sum(1, keepdim=True) * inverse).reshape(self.size.shape))
        inside = gradient * (self.size.detach().float().reshape(-1, 1) * inverse)
        add_gradient(self.up, self.scale * inside @ self.down.detach().float().mT)
        add_gradient(self.down, self.scale * self.up.detach().float().mT @ inside)
        return energy


def _oriented(module: Any, weight: Tensor | None = None) -> Dense:
    """A module's weight as (o, i)."""
    own: Tensor = module.weight.detach() if weight is None else weight
    return own.mT if isinstance(module, Conv1D) else own


def add_gradient(parameter: Any, gradient: Tensor) -> None:
    """Add a penalty's gradient, if the parameter is trained.

    Before a step gradients are empty, and the backward pass adds the loss's: clipping and optimiser see the sum.
    """
    if parameter.requires_grad:
        gradient = gradient.to(parameter.dtype)
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
