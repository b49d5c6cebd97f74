"""What the linear maps of a model read, and how much it matters: second moments of their inputs and gradients of their outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from recall_merge.models.tokens import NO_LABEL, EncodedRow


@dataclass(frozen=True)
class Inputs:
    """The inputs of one linear map, or of several that read the same hidden states: q, k and v of a block share theirs."""

    modules: tuple[str, ...]  # dotted names
    axis: int  # of the weights along which inputs run: 1 for torch's Linear (o, i), 0 for GPT-2's Conv1D (i, o)
    moment: Tensor  # sum over tokens of x x^T / tokens, (i, i) float64; zeros where no token arrived, as at an expert without any
    gradients: tuple[Tensor, ...]
    """Per module, the mean over rows of the sum over tokens of g^2, (o,) float64; g is the gradient of the log-likelihood of predictions
    that the model makes itself, with respect to the map's output."""
    tokens: int  # that arrived


def input_moments(
    model: nn.Module, rows: Sequence[EncodedRow], *, seed: int = 0, progress: Callable[[int], None] = lambda _: None
) -> list[Inputs]:
    """The second moments of the inputs of every linear map over all tokens of the rows, and the squared gradients of its outputs.

    At each position whose next token has a label, one prediction is drawn from the model's own distribution: the squares of its gradients
    are the diagonal of the model's Fisher information. Rows run one by one, so none is padded. Maps inside fused mixtures of experts, which
    are not modules, are not seen.
    """
    maps: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    sums: dict[str, _Sums] = {}
    generator = torch.Generator().manual_seed(seed)
    with _record_reads(model, maps) as reads:
        for row in rows:
            reads.clear()
            logits = model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0].float()
            labelled = logits[:-1][torch.tensor(row.labels[1:], dtype=torch.long) != NO_LABEL]  # position t predicts token t + 1
            if len(labelled):
                drawn = torch.multinomial(labelled.detach().softmax(-1), 1, generator=generator).squeeze(1)
                cross_entropy(labelled, drawn, reduction="sum").backward()
            for name, read in reads.items():
                sums.setdefault(name, _Sums(read.leader)).add(read, is_leader=read is reads[read.leader])
            progress(len(row.input_ids))
    groups: dict[str, list[str]] = {}
    for name in maps:
        groups.setdefault(sums[name].leader if name in sums else name, []).append(name)
    inputs = []
    for leader, names in groups.items():
        axis = 1 if isinstance(maps[leader], nn.Linear) else 0
        size, total = maps[leader].weight.shape[axis], sums.get(leader, _Sums(leader))
        moment = torch.zeros(size, size, dtype=torch.float64) if total.moment is None else total.moment / total.tokens
        gradients = []
        for name in names:
            gradient = sums[name].gradient if name in sums else None
            nothing = torch.zeros(maps[name].weight.shape[1 - axis], dtype=torch.float64)
            gradients.append(nothing if gradient is None else gradient / len(rows))
        inputs.append(Inputs(tuple(names), axis, moment, tuple(gradients), total.tokens))
    return inputs


class _Read:
    """The inputs of one map in one row, and after the backward pass the squared gradients of its outputs."""

    def __init__(self, leader: str, x: Tensor) -> None:
        self.leader = leader  # the first map that read the same hidden states
        self.x = x.detach()
        self.squares: Tensor | None = None  # (tokens, o)

    def keep_squares(self, gradient: Tensor) -> None:
        self.squares = gradient.detach().reshape(-1, gradient.shape[-1]).double().square()


class _Sums:
    """Sums over rows for one map. Those of inputs are kept by the leader."""

    def __init__(self, leader: str) -> None:
        self.leader = leader
        self.moment: Tensor | None = None
        self.tokens = 0
        self.gradient: Tensor | None = None

    def add(self, read: _Read, *, is_leader: bool) -> None:
        if read.squares is not None:
            squares = read.squares.sum(0)
            self.gradient = squares if self.gradient is None else self.gradient + squares
        x = read.x.reshape(-1, read.x.shape[-1]).double()
        if is_leader and len(x):
            self.tokens += len(x)
            moment = x.mT @ x
            self.moment = moment if self.moment is None else self.moment.add_(moment)


@contextmanager
def _record_reads(model: nn.Module, maps: dict[str, Any]) -> Iterator[dict[str, _Read]]:
    """What each map reads in the latest pass, by name. Hidden states get gradients, parameters get none."""
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    reads: dict[str, _Read] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            x = args[0]
            leader = next((other for other, read in reads.items() if read.leader == other and _is_same(read.x, x)), name)
            reads[name] = _Read(leader, x)
            if output.requires_grad:
                output.register_hook(reads[name].keep_squares)

        return hook

    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    handles = [embedding.register_forward_hook(lambda _, args, output: output.detach().requires_grad_())]
    handles += [module.register_forward_hook(record(name)) for name, module in maps.items()]
    model.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield reads
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])


def _is_same(x: Tensor, y: Tensor) -> bool:
    """The very same tensor in memory, not an equal one."""
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()
