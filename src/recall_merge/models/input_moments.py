"""What the linear maps of a model read: a sketch of the second moment of each one's inputs; and how much their outputs matter.

Inputs are seen while the model runs, block by block or whole, and are folded into the sketches batch by batch, in order. So memory holds
what the maps of a block have read of a batch, beside the sketches, and the result does not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from recall_merge.maths.moments import HELD, Moment, Sketch
from recall_merge.maths.trimming import Start
from recall_merge.models.load import running
from recall_merge.models.reads import Map, Read, record_reads
from recall_merge.models.tokens import NO_LABEL, EncodedRow
from recall_merge.runtime.errors import NotLayerwise
from recall_merge.runtime.parallel import in_order

HELD_OF_MANY = HELD // 4  # rows that a sketch holds where those of all blocks are filled at once


@dataclass(frozen=True)
class Inputs:
    """The inputs of one linear map, or of several that read the same hidden states: q, k and v of a block share theirs."""

    maps: tuple[Map, ...]
    axis: int  # of the weights along which inputs run: 1 for torch's Linear (o, i), 0 for GPT-2's Conv1D (i, o)
    moment: Moment
    tokens: int  # that arrived: at least one


class InputSketches:
    """What linear maps have read. Maps that read the very same tensor share a sketch.

    Args:
        parameters: the names of those that are seen, with their shapes.
        rank: directions of each moment.
        draw: the random numbers for a group of maps, by the name of the first one.
        held: rows that each sketch holds; of an expert of a mixture, `HELD_OF_MANY`.
    """

    def __init__(self, parameters: Mapping[str, tuple[int, ...]], rank: int, draw: Callable[[str], Start], *, held: int = HELD) -> None:
        self.parameters, self._rank, self._draw, self._held = parameters, rank, draw, held
        self._groups: dict[Map, list[Map]] = {}  # by the first map of each
        self._leaders: dict[Map, Map] = {}
        self._axes: dict[Map, int] = {}
        self._sketches: dict[Map, Sketch] = {}  # by the first map of their group

    def fold(self, reads: Sequence[Read], present: Tensor | None = None) -> None:
        """Take in what was read of a batch; where `present` (b, t) is False there is padding.

        Raises NotLayerwise if it cannot be told which inputs are padding.
        """
        parts = [part for read in reads for part in self._by_map(read)]
        for number, (map_, axis, x) in enumerate(parts):
            if map_ not in self._leaders:
                leader = next((other for other, _, y in parts[:number] if other in self._groups and _in_memory(y) == _in_memory(x)), map_)
                self._leaders[map_], self._axes[map_] = leader, axis
                self._groups.setdefault(leader, []).append(map_)
            if self._leaders[map_] == map_ and len(rows := _rows(x, present)):
                if map_ not in self._sketches:
                    held = self._held if map_.expert is None else min(self._held, HELD_OF_MANY)
                    self._sketches[map_] = Sketch(self._rank, self._draw(str(map_)), held=held)
                self._sketches[map_].add(rows)

    def fold_here(self, reads: Sequence[Read], present: Tensor) -> None:
        """`fold` on the processor, for devices that do not sum in float64. What several maps share is copied once."""
        different = {_in_memory(read.inputs): read.inputs for read in reads}
        copies = {place: x.cpu() for place, x in different.items()}
        self.fold([replace(read, inputs=copies[_in_memory(read.inputs)]) for read in reads], present.cpu())

    def _by_map(self, read: Read) -> Iterator[tuple[Map, int, Tensor]]:
        """What was read, by map: of all experts at once, each one's, without the zeros that stand for the tokens of others."""
        name, expert = read.map
        if expert is None and len(self.parameters[name]) == 3:
            for number, x in enumerate(read.inputs):
                yield Map(name, number), read.axis, x[(x != 0).any(1)]
        else:
            yield read.map, read.axis, read.inputs

    def finish(self, threads: int = 1) -> list[Inputs]:
        """The inputs of all maps that were reached, which are forgotten. `threads` does not change them."""
        reached = list(self._sketches.items())
        moments = in_order(lambda entry: entry[1].moment(), reached, threads)
        found = [
            Inputs(tuple(self._groups[leader]), self._axes[leader], moment, sketch.count)
            for (leader, sketch), moment in zip(reached, moments, strict=True)
        ]
        self._groups, self._leaders, self._axes, self._sketches = {}, {}, {}, {}
        return found


def inputs_of_whole(
    model: nn.Module,
    rows: Sequence[EncodedRow],
    sketches: InputSketches,
    *,
    gradients: dict[str, Tensor] | None = None,
    seed: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Inputs]:
    """The inputs of linear maps over all tokens of the rows, from a whole model. Rows run one by one, so none is padded.

    Args:
        gradients: gets, by parameter, the mean over rows of the sum over tokens of g^2, (o,) or (E, o), in float64: g is the gradient of
            the log-likelihood of predictions that the model makes itself, with respect to the map's output. At each position whose next
            token has a label, one prediction is drawn from the model's own distribution, so these are the diagonal of its Fisher
            information. None: no pass back.

    Raises FloatingPointError if logits are NaN or infinite.
    """
    generator = torch.Generator().manual_seed(seed)
    with _recorded(model, sketches.parameters, gradients) as reads:
        for row in rows:
            with running(model):
                logits = model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0].float()
            labelled = logits[:-1][torch.tensor(row.labels[1:], dtype=torch.long) != NO_LABEL]  # position t predicts token t + 1
            if not labelled.logsumexp(-1).isfinite().all():
                raise FloatingPointError
            if gradients is not None and len(labelled):
                drawn = torch.multinomial(labelled.detach().softmax(-1), 1, generator=generator).squeeze(1)
                cross_entropy(labelled, drawn, reduction="sum").backward()
            sketches.fold(reads)
            reads.clear()
            progress(len(row.input_ids))
    for sums in (gradients or {}).values():
        sums.div_(len(rows))
    return sketches.finish()


@contextmanager
def _recorded(model: nn.Module, parameters: Mapping[str, tuple[int, ...]], squares: dict[str, Tensor] | None) -> Iterator[list[Read]]:
    """What each map reads in a pass; the squared gradients of its outputs are added to `squares`, if they are wanted, in the pass back.

    Hidden states get gradients, parameters get none.
    """
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    reads: list[Read] = []

    def see(read: Read, output: Tensor) -> None:
        reads.append(read)
        if squares is not None:
            name, expert = read.map
            sums = squares.setdefault(name, torch.zeros(*parameters[name][:-2], output.shape[-1], dtype=torch.float64))
            sums = sums if expert is None else sums[expert]
            if output.requires_grad:  # of all experts at once, each one's answers count where a token is routed to it
                counts = 1 if sums.ndim == 1 else (read.inputs != 0).any(-1, keepdim=True)
                output.register_hook(lambda gradient: add_squares(sums, gradient.detach() * counts))

    def add_squares(sums: Tensor, gradient: Tensor) -> None:
        sums += gradient.reshape(*sums.shape[:-1], -1, sums.shape[-1]).double().square().sum(-2)

    handles = record_reads(model, parameters, see)
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


def _in_memory(x: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    """What two tensors have in common that are one in memory, not only equal."""
    return x.data_ptr(), x.shape, x.stride()
