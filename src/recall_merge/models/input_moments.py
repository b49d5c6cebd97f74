"""What the linear maps of a model read, and how much it matters: second moments of their inputs and gradients of their outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from recall_merge.models.load import running
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
    are not modules, are not seen. Raises FloatingPointError if logits are NaN or infinite.
    """
    maps: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    axes = {name: 1 if isinstance(module, nn.Linear) else 0 for name, module in maps.items()}  # of inputs
    leaders: dict[str, str] = {}
    moments: dict[str, Tensor] = {}  # sums over the tokens of all rows, by leader
    tokens: Counter[str] = Counter()
    gradients = {name: torch.zeros(module.weight.shape[1 - axes[name]], dtype=torch.float64) for name, module in maps.items()}
    generator = torch.Generator().manual_seed(seed)
    with _record_reads(model, maps) as reads:
        for row in rows:
            reads.clear()
            with running(model):
                logits = model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0].float()
            labelled = logits[:-1][torch.tensor(row.labels[1:], dtype=torch.long) != NO_LABEL]  # position t predicts token t + 1
            if not labelled.logsumexp(-1).isfinite().all():
                raise FloatingPointError
            if len(labelled):
                drawn = torch.multinomial(labelled.detach().softmax(-1), 1, generator=generator).squeeze(1)
                cross_entropy(labelled, drawn, reduction="sum").backward()
            for name, read in reads.items():
                leaders.setdefault(name, read.leader)
                gradients[name] += read.squares
                if read.leader == name and len(x := read.x.reshape(-1, read.x.shape[-1]).double()):
                    tokens[name] += len(x)
                    moments[name] = moments[name].add_(x.mT @ x) if name in moments else x.mT @ x
            progress(len(row.input_ids))
    groups: dict[str, list[str]] = {}
    for name in maps:
        groups.setdefault(leaders.get(name, name), []).append(name)
    inputs = []
    for leader, names in groups.items():
        size = maps[leader].weight.shape[axes[leader]]
        moment = moments[leader] / tokens[leader] if leader in moments else torch.zeros(size, size, dtype=torch.float64)
        inputs.append(Inputs(tuple(names), axes[leader], moment, tuple(gradients[name] / len(rows) for name in names), tokens[leader]))
    return inputs


class _Read:
    """The inputs of one map in one row, and after the backward pass the squared gradients of its outputs."""

    def __init__(self, leader: str, x: Tensor) -> None:
        self.leader = leader  # the first map that read the same hidden states
        self.x = x.detach()
        self.squares: Tensor | float = 0.0  # (o,), summed over tokens

    def keep_squares(self, gradient: Tensor) -> None:
        self.squares = gradient.detach().reshape(-1, gradient.shape[-1]).double().square().sum(0)


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
