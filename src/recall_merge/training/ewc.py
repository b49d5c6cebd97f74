"""Elastic weight consolidation: hold the weights that earlier tasks need near where those tasks left them (Kirkpatrick et al. 2017).

With theta_j the weights after task j and F_j their diagonal Fisher information on task j's rows, task i is trained on

    loss_i(theta) + lambda / 2 * sum_{j<i} sum_n F_j[n] (theta[n] - theta_j[n])^2

A sum of parabolas is a parabola: up to a constant it is A (theta - m)^2 with A = sum_j F_j and m = sum_j F_j theta_j / A. So an `Anchor`
of two tensors per parameter stands for any number of tasks, with the same gradient.

Where we depart from the paper: F is the empirical Fisher information, from the rows' own answers instead of answers drawn from the model;
and with adapters the weights are the factors A and B, since these are trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from recall_merge.runtime.durable import replacing
from recall_merge.runtime.progress import Advance
from recall_merge.training.trained_maps import add_gradient


class Pull(NamedTuple):
    """How much a parameter matters to earlier tasks, and the value that they want: (*s) each."""

    importance: Tensor
    centre: Tensor


Anchor = dict[str, Pull]
"""By the names of the trained parameters."""


def fisher(model: nn.Module, rows: Iterable[tuple[Sequence[int], Sequence[int]]], advance: Advance = lambda _: None) -> dict[str, Tensor]:
    """Diagonal empirical Fisher information: for each trained parameter the mean over rows of its squared gradient.

    The gradient is that of a row's mean loss over its labelled tokens: the loss that training sees, in a batch of one.
    A row is (token ids, labels), -100 where a token has no label.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    total = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
    count, device = 0, next(model.parameters()).device
    for ids, labels in rows:
        model.zero_grad()
        read, wanted = (torch.tensor([list(numbers)], device=device) for numbers in (ids, labels))
        model(input_ids=read, labels=wanted, use_cache=False).loss.backward()
        for name, parameter in trained.items():
            if parameter.grad is not None:
                total[name] += parameter.grad**2
        count += 1
        advance(1)
    model.zero_grad()
    return {name: (squares / count).cpu() for name, squares in total.items()}


def anchored(importance: dict[str, Tensor], values: dict[str, Tensor], before: Anchor | None = None) -> Anchor:
    """An anchor with one more task: A + F, and the mean of the centres weighted by importance.

    >>> first = anchored({"w": torch.tensor([1.0])}, {"w": torch.tensor([2.0])})
    >>> both = anchored({"w": torch.tensor([3.0])}, {"w": torch.tensor([6.0])}, first)["w"]    # A = 1 + 3, m = (1 * 2 + 3 * 6) / 4
    >>> both.importance.item(), both.centre.item()
    (4.0, 5.0)
    """
    anchor: Anchor = {}
    for name, new in importance.items():
        old = before[name] if before else Pull(torch.zeros_like(new), torch.zeros_like(new))
        total = old.importance + new
        centre = (old.importance * old.centre + new * values[name]) / total
        anchor[name] = Pull(total, torch.where(total > 0, centre, values[name]))
    return anchor


class Consolidation(TrainerCallback):
    """Adds the penalty's gradient, lambda A (theta - m), to that of the loss in every training step."""

    def __init__(self, anchor: Anchor, strength: float) -> None:
        self._anchor = anchor
        self._strength = strength

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                pull = self._anchor[name] = Pull(*(part.to(parameter.device) for part in self._anchor[name]))
                add_gradient(parameter, self._strength * pull.importance * (parameter.detach() - pull.centre))


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters, by name."""
    return {name: parameter.detach().clone().cpu() for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_anchor(anchor: Anchor, path: Path) -> None:
    """Write an anchor as one safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    tensors = {f"{name}.{part}": tensor.contiguous() for name, pull in anchor.items() for part, tensor in pull._asdict().items()}
    with replacing(path) as partial:
        save_file(tensors, partial)


def load_anchor(path: Path) -> Anchor:
    from safetensors.torch import load_file

    tensors = load_file(path)
    names = {name.rpartition(".")[0] for name in tensors}
    return {name: Pull(tensors[f"{name}.importance"], tensors[f"{name}.centre"]) for name in sorted(names)}
