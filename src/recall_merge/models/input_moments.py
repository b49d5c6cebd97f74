"""What the linear maps of a model read: a sketch of the second moment of each one's inputs; and how much their outputs matter.

Inputs are seen while the model runs, block by block or whole, and are folded into the sketches batch by batch, in order. So memory holds
what the maps of a block have read of a batch, beside the sketches, and the result does not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from recall_merge.maths.moments import HELD, Moment, Sketch
from recall_merge.maths.trimming import Start
from recall_merge.models.layerwise import Reads
from recall_merge.models.load import running
from recall_merge.models.tokens import NO_LABEL, EncodedRow
from recall_merge.runtime.errors import NotLayerwise
from recall_merge.runtime.parallel import in_order

HELD_OF_MANY = HELD // 4  # rows that a sketch holds where those of all blocks are filled at once


@dataclass(frozen=True)
class Inputs:
    """The inputs of one linear map, or of several that read the same hidden states: q, k and v of a block share theirs."""

    modules: tuple[str, ...]  # dotted names
    axis: int  # of the weights along which inputs run: 1 for torch's Linear (o, i), 0 for GPT-2's Conv1D (i, o)
    moment: Moment
    tokens: int  # that arrived: at least one
    gradients: tuple[Tensor, ...] = ()
    """Per module, the mean over rows of the sum over tokens of g^2, (o,) float64; g is the gradient of the log-likelihood of predictions
    that the model makes itself, with respect to the map's output. Empty where there was no pass back."""


def linear_maps(model: nn.Module) -> dict[str, Any]:
    """The linear maps of a model by dotted names. Those inside fused mixtures of experts are no modules, and not seen."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


class InputSketches:
    """What linear maps have read. Maps that read the very same tensor share a sketch.

    Args:
        maps: those that are seen.
        rank: directions of each moment.
        draw: the random numbers for a group of maps, by the name of the first one.
        held: rows that each sketch holds.
    """

    def __init__(self, maps: Mapping[str, Any], rank: int, draw: Callable[[str], Start], *, held: int = HELD) -> None:
        self.maps, self._rank, self._draw, self._held = maps, rank, draw, held
        self._groups: dict[str, list[str]] = {}  # by the first map of each
        self._leaders: dict[str, str] = {}
        self._sketches: dict[str, Sketch] = {}  # by the first map of their group

    def fold(self, reads: Reads, present: Tensor | None = None) -> None:
        """Take in what was read of a batch; where `present` (b, t) is False there is padding.

        Raises NotLayerwise if it cannot be told which inputs are padding.
        """
        for number, (name, x) in enumerate(reads):
            if name not in self._leaders:
                leader = next((other for other, read in reads[:number] if other in self._groups and _is_same(read, x)), name)
                self._leaders[name] = leader
                self._groups.setdefault(leader, []).append(name)
            if self._leaders[name] == name and len(rows := _rows(x, present)):
                if name not in self._sketches:
                    self._sketches[name] = Sketch(self._rank, self._draw(name), held=self._held)
                self._sketches[name].add(rows)

    def fold_here(self, reads: Reads, present: Tensor) -> None:
        """`fold` on the processor, for devices that do not sum in float64. What several maps share is copied once."""
        copies = {id(x): x.cpu() for _, x in reads}
        self.fold([(name, copies[id(x)]) for name, x in reads], present.cpu())

    def finish(self, threads: int = 1) -> list[Inputs]:
        """The inputs of all maps that were reached, which are forgotten. `threads` does not change them."""
        reached = list(self._sketches.items())
        moments = in_order(lambda entry: entry[1].moment(), reached, threads)
        found = [
            Inputs(tuple(self._groups[leader]), 1 if isinstance(self.maps[leader], nn.Linear) else 0, moment, sketch.count)
            for (leader, sketch), moment in zip(reached, moments, strict=True)
        ]
        self._groups, self._leaders, self._sketches = {}, {}, {}
        return found


def inputs_of_whole(
    model: nn.Module,
    rows: Sequence[EncodedRow],
    sketches: InputSketches,
    *,
    gradients: bool = False,
    seed: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Inputs]:
    """The inputs of linear maps over all tokens of the rows, from a whole model; with `gradients`, those of its outputs too.

    At each position whose next token has a label, one prediction is drawn from the model's own distribution: the squares of its gradients
    are the diagonal of the model's Fisher information. Rows run one by one, so none is padded. Raises FloatingPointError if logits are NaN
    or infinite.
    """
    sizes = {name: module.weight.shape[isinstance(module, Conv1D)] for name, module in sketches.maps.items()}  # of outputs
    squares = {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}  # sums over tokens and rows
    generator = torch.Generator().manual_seed(seed)
    with _record_reads(model, sketches.maps, squares if gradients else None) as reads:
        for row in rows:
            with running(model):
                logits = model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0].float()
            labelled = logits[:-1][torch.tensor(row.labels[1:], dtype=torch.long) != NO_LABEL]  # position t predicts token t + 1
            if not labelled.logsumexp(-1).isfinite().all():
                raise FloatingPointError
            if gradients and len(labelled):
                drawn = torch.multinomial(labelled.detach().softmax(-1), 1, generator=generator).squeeze(1)
                cross_entropy(labelled, drawn, reduction="sum").backward()
            sketches.fold(reads)
            reads.clear()
            progress(len(row.input_ids))
    found = sketches.finish()
    if not gradients:
        return found
    return [replace(each, gradients=tuple(squares[name] / len(rows) for name in each.modules)) for each in found]


@contextmanager
def _record_reads(model: nn.Module, maps: Mapping[str, Any], squares: Mapping[str, Tensor] | None) -> Iterator[Reads]:
    """What each map reads in a pass; the squared gradients of its outputs are added to `squares`, if they are wanted, in the pass back.

    Hidden states get gradients, parameters get none.
    """
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    reads: Reads = []

    def record(name: str, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        reads.append((name, args[0].detach()))
        if squares is not None and output.requires_grad:
            output.register_hook(partial(add_squares, squares[name]))

    def add_squares(sums: Tensor, gradient: Tensor) -> None:
        sums += gradient.detach().reshape(-1, gradient.shape[-1]).double().square().sum(0)

    handles = [module.register_forward_hook(partial(record, name)) for name, module in maps.items()]
    if squares is not None:
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        handles.append(embedding.register_forward_hook(lambda _, args, output: output.detach().requires_grad_()))
    model.requires_grad_(False)
    try:
        with torch.set_grad_enabled(squares is not None):
            yield reads
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])


def _rows(x: Tensor, present: Tensor | None) -> Tensor:
    """The inputs without padding. (b, t, .., i) or (b t, .., i) -> (n, i)"""
    if present is not None and not present.all():
        if x.shape[:2] == present.shape:
            x = x[present]
        elif len(x) == present.numel():
            x = x[present.flatten()]
        else:
            what = f"its linear maps read tensors of shape {tuple(x.shape)} for texts of shape {tuple(present.shape)}"
            raise NotLayerwise(what, fix="report the architecture: which of its inputs are padding is not known")
    return x.reshape(-1, x.shape[-1])


def _is_same(x: Tensor, y: Tensor) -> bool:
    """The very same tensor in memory, not an equal one."""
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()
