"""Second moments of the inputs of a model's linear maps, from one pass over given texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recall_merge.models.hidden import make_batches


@dataclass(frozen=True)
class Inputs:
    """What went into one or several linear maps that read the same hidden state.

    Attributes:
        modules: their dotted names (q, k and v of a block share their inputs).
        axis: of their weights, along which inputs run: 1 for torch's Linear (o, i), 0 for GPT-2's Conv1D (i, o).
        moment: sum over tokens of x x^T / tokens, (i, i) float64; zeros where no token arrived, as at an expert nobody was routed to.
        tokens: how many arrived.
    """

    modules: tuple[str, ...]
    axis: int
    moment: Tensor
    tokens: int


def input_moments(model: nn.Module, tokens: Sequence[Sequence[int]], *, progress: Callable[[int], None] = lambda _: None) -> list[Inputs]:
    """The second moment of the inputs of every linear map of a model, over all tokens of the texts but padding.

    Maps inside fused mixtures of experts, which are no modules of their own, are not seen. Runs on one thread a batch, in order.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    shared: dict[str, str] = {}  # module -> the one whose sum it shares
    current: dict[str, Any] = {}

    def hook(name: str) -> Callable[..., None]:
        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            if shared.get(name, name) != name:
                return
            if name not in sums and (leader := _same(x, current["seen"], shared)) is not None:
                shared[name] = leader
                return
            shared.setdefault(name, name)
            current["seen"].append((name, x))
            rows = x[current["mask"]] if x.shape[:2] == current["mask"].shape else x.reshape(-1, x.shape[-1])
            rows = rows.double()
            sums[name] = sums[name].addmm_(rows.mT, rows) if name in sums else rows.mT @ rows
            counts[name] = counts.get(name, 0) + len(rows)

        return before

    with _hooked(model, hook) as maps:
        for batch in make_batches([len(ids) for ids in tokens]):
            lengths = torch.tensor([len(tokens[row]) for row in batch])
            width = int(lengths.max())
            ids = torch.tensor([list(tokens[row]) + [0] * (width - len(tokens[row])) for row in batch])
            mask = torch.arange(width) < lengths.unsqueeze(1)
            current |= {"mask": mask, "seen": []}
            with torch.inference_mode():
                model(input_ids=ids, attention_mask=mask.long(), use_cache=False)
            progress(int(lengths.sum()))
    found = []
    for leader in maps:
        names = tuple(name for name in maps if shared.get(name, name) == leader)
        if not names:
            continue
        size = maps[leader].weight.shape[_axis(maps[leader])]
        tokens_seen = counts.get(leader, 0)
        moment = sums[leader] / tokens_seen if tokens_seen else torch.zeros(size, size, dtype=torch.float64)
        found.append(Inputs(names, _axis(maps[leader]), moment.clone(), tokens_seen))
    return found


def _axis(module: nn.Module) -> int:
    return 1 if isinstance(module, nn.Linear) else 0


def _same(x: Tensor, seen: list[tuple[str, Tensor]], shared: dict[str, str]) -> str | None:
    """The map that has read this very tensor in this pass."""
    return next((name for name, other in seen if other is x), None)


@contextmanager
def _hooked(model: nn.Module, hook: Callable[[str], Any]) -> Iterator[dict[str, Any]]:
    from transformers.pytorch_utils import Conv1D

    maps = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in maps.items()]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()
