"""What a model's linear maps read, and how much it mattered: second moments of their inputs, from a pass forth and back over given rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from recall_merge.models.tokens import EncodedRow


@dataclass(frozen=True)
class Inputs:
    """What went into one or several linear maps that read the same hidden state.

    Attributes:
        modules: their dotted names (q, k and v of a block share their inputs).
        axis: of their weights, along which inputs run: 1 for torch's Linear (o, i), 0 for GPT-2's Conv1D (i, o).
        moment: sum over tokens of x x^T / tokens, (i, i) float64; zeros where no token arrived, as at an expert nobody was routed to.
        gradients: of each module, the mean over rows of the sum over tokens of g^2, (o,) float64; g is the gradient of the
            log-likelihood of predictions that the model makes itself, by the map's output.
        tokens: how many arrived.
    """

    modules: tuple[str, ...]
    axis: int
    moment: Tensor
    gradients: tuple[Tensor, ...]
    tokens: int


def input_moments(
    model: nn.Module, rows: Sequence[EncodedRow], *, seed: int = 0, progress: Callable[[int], None] = lambda _: None
) -> list[Inputs]:
    """The second moments of the inputs of every linear map of a model over all tokens of the rows, and the gradients of its outputs.

    Predictions are drawn at the positions whose next token has a label, one each, from the model's own distribution: the squares of their
    gradients are the diagonal of its Fisher information. Row by row, so nothing is padded. Maps inside fused mixtures of experts, which
    are no modules of their own, are not seen.
    """
    found: dict[str, _Sums] = {}
    drawn = torch.Generator().manual_seed(seed)
    with _watched(model) as (maps, reads):
        for row in rows:
            reads.clear()
            logits = model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0].float()
            asked = logits[:-1][torch.tensor(row.labels[1:], dtype=torch.long) != -100]  # position t predicts token t + 1
            if len(asked):
                said = torch.multinomial(asked.detach().softmax(-1), 1, generator=drawn).squeeze(1)
                cross_entropy(asked, said, reduction="sum").backward()
            for name, read in reads.items():
                found.setdefault(name, _Sums(read.leader)).add(read, reads)
            progress(len(row.input_ids))
    groups: dict[str, list[str]] = {}
    for name in maps:
        groups.setdefault(found[name].leader if name in found else name, []).append(name)
    return [_inputs(names, maps, found, len(rows)) for names in groups.values()]


class _Read:
    """What one map read in one row: its inputs, and after the pass back the squared gradients of its outputs."""

    def __init__(self, leader: str, x: Tensor) -> None:
        self.leader = leader
        self.x = x.detach()
        self.squares: Tensor | None = None  # (tokens, o)

    def hear(self, gradient: Tensor) -> None:
        self.squares = gradient.detach().reshape(-1, gradient.shape[-1]).double().square()


class _Sums:
    """Sums over the rows so far, of one map; those of inputs are kept by the first map that reads them."""

    def __init__(self, leader: str) -> None:
        self.leader = leader
        self.moment: Tensor | None = None
        self.tokens = 0
        self.gradient: Tensor | None = None

    def add(self, read: _Read, reads: dict[str, _Read]) -> None:
        if read.squares is not None:
            sums = read.squares.sum(0)
            self.gradient = sums if self.gradient is None else self.gradient + sums
        x = read.x.reshape(-1, read.x.shape[-1]).double()
        if read is not reads[read.leader] or not len(x):
            return
        self.tokens += len(x)
        moment = x.mT @ x
        self.moment = moment if self.moment is None else self.moment.add_(moment)


def _inputs(names: list[str], maps: dict[str, Any], found: dict[str, _Sums], rows: int) -> Inputs:
    first = maps[names[0]]
    axis = 1 if isinstance(first, nn.Linear) else 0
    size = first.weight.shape[axis]
    sums = found.get(names[0], _Sums(names[0]))
    nothing = torch.zeros(size, size, dtype=torch.float64)
    moment = nothing if sums.moment is None else sums.moment / sums.tokens
    gradients = []
    for name in names:
        gradient = found[name].gradient if name in found else None
        gradients.append(torch.zeros(maps[name].weight.shape[1 - axis], dtype=torch.float64) if gradient is None else gradient / rows)
    return Inputs(tuple(names), axis, moment, tuple(gradients), sums.tokens)


@contextmanager
def _watched(model: nn.Module) -> Iterator[tuple[dict[str, Any], dict[str, _Read]]]:
    """The linear maps of a model by name, and what they read in the latest pass. Parameters get no gradients, hidden states do."""
    from transformers.pytorch_utils import Conv1D

    maps = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    reads: dict[str, _Read] = {}

    def before(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            leader = next((other for other, read in reads.items() if read.leader == other and _is_same(read.x, args[0])), name)
            reads[name] = _Read(leader, args[0])

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(reads[name].hear)

        return hook

    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    handles = [embedding.register_forward_hook(lambda _, args, output: output.detach().requires_grad_())]
    for name, module in maps.items():
        handles += [module.register_forward_pre_hook(before(name)), module.register_forward_hook(after(name))]
    model.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield maps, reads
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])


def _is_same(one: Tensor, other: Tensor) -> bool:
    """The very same state, not an equal one."""
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
