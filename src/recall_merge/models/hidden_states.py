"""The pooled hidden states of a whole model on given texts, at every layer, in one forward pass; and the batches that texts run in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn

from recall_merge.maths.layers import Layers
from recall_merge.models.load import running
from recall_merge.runtime.errors import CheckpointError
from recall_merge.runtime.parallel import in_order

Pooling = Literal["mean", "last"]
COMPARE_NOTHING = "merge with a method that compares no hidden states, such as `method: linear`"
BATCH_TOKENS = 512  # padded tokens per batch: enough for a processor's fast matrix products; twice as many take twice the memory


def pooled_hidden_states(
    model: nn.Module,
    tokens: Sequence[Sequence[int]],
    layers: Layers,
    *,
    at: Iterable[int] | None = None,
    pooling: Pooling = "mean",
    threads: int = 1,
    batch_tokens: int | None = None,
) -> Tensor:
    """Pooled hidden states.    m token lists -> (len(at), m, d), float32

    Layer 0 is what enters the first block (the embedding's output), layer i what leaves block i, before any final norm. Where blocks pass
    several streams a token (Gemma 3n, DeepSeek-V4), it is what the model would hand to its head if it ended there.

    Args:
        model: in evaluation mode, any decoder-only model of transformers.
        at: the layers wanted, rising; all of 0..L by default. Nothing after the last of them is computed.
        pooling: 'mean' over the tokens that are not padding, or the 'last' of them.
        threads: batches at a time. A batch runs on one thread and is made from lengths alone, so the numbers do not depend on `threads`.
        batch_tokens: padded tokens per batch, `BATCH_TOKENS` by default.
    """
    wanted = list(range(layers.blocks + 1) if at is None else at)
    blocks = find_blocks(model, layers)
    device = next(model.parameters()).device
    current = threading.local()  # of the batch that runs on this thread

    def through(layer: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A block's forward pass that keeps what it passes on; or, where the model is taken to have `ended` before, passes that on."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if current.ended is not None:
                return current.ended
            if layer == 1:
                keep(0, before_first(args, kwargs))
            output = forward(*args, **kwargs)
            keep(layer, output)
            return output

        return call

    def keep(layer: int, output: Any) -> None:
        if layer in wanted:
            hidden = after_block(output)
            current.states[layer] = pool(hidden, current.lengths, pooling) if hidden.ndim == 3 else output
        if layer == wanted[-1]:
            raise _Enough

    def head_input(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        current.states[current.layer] = pool(args[0], current.lengths, pooling)
        raise _Enough

    def run(batch: list[int]) -> Tensor:
        ids, mask, current.lengths = padded([tokens[row] for row in batch], device)
        current.states, current.ended = {}, None
        with running(model), torch.inference_mode(), suppress(_Enough):
            model(input_ids=ids, attention_mask=mask, use_cache=False)
        for current.layer in wanted:
            current.ended = current.states[current.layer]
            if after_block(current.ended).ndim > 2:  # several streams
                with torch.inference_mode(), suppress(_Enough):
                    model(input_ids=ids, attention_mask=mask, use_cache=False)
        return torch.stack([current.states[layer] for layer in wanted]).cpu()

    hook = model.get_output_embeddings().register_forward_pre_hook(head_input)  # type: ignore[operator]
    for layer, block in enumerate(blocks, 1):
        block.forward = through(layer, block.forward)
    batches = make_batches([len(ids) for ids in tokens], batch_tokens)
    try:
        parts = list(in_order(run, batches, threads))
    finally:
        hook.remove()
        for block in blocks:
            del block.forward
    states = torch.empty(len(wanted), len(tokens), parts[0].shape[-1], dtype=torch.float32)
    for batch, part in zip(batches, parts, strict=True):
        states[:, batch] = part
    return states


def before_first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What enters the first block, from its arguments."""
    return args[0] if args else kwargs["hidden_states"]


def after_block(output: Any) -> Tensor:
    """What a block passes on, from all that it returns."""
    return output[0] if isinstance(output, tuple | list) else output


def padded(tokens: Sequence[Sequence[int]], device: torch.device | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """One batch, on a device: ids (b, t) with padding on the right, the mask (b, t) that hides it, and lengths (b,)."""
    lengths = torch.tensor([len(ids) for ids in tokens])
    width = int(lengths.max())
    ids = torch.tensor([list(ids) + [0] * (width - len(ids)) for ids in tokens])
    return ids.to(device), (torch.arange(width) < lengths.unsqueeze(1)).long().to(device), lengths.to(device)


def pool(hidden: Tensor, lengths: Tensor, pooling: Pooling) -> Tensor:
    """One vector per text, in float32.    hidden (b, t, d), lengths (b,) -> (b, d); padding lies on the right.

    mean: the mean over a text's own tokens; last: its last own token.

    >>> pool(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([2]), "mean")
    tensor([[2.]])
    """
    hidden = hidden.float()
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
    mask = (torch.arange(hidden.shape[1], device=hidden.device) < lengths.unsqueeze(1)).unsqueeze(-1)  # (b, t, 1)
    return (hidden * mask).sum(1) / lengths.unsqueeze(1)


def make_batches(lengths: Sequence[int], limit: int | None = None) -> list[list[int]]:
    """Group texts by length into batches of at most `limit` padded tokens (at least one text each); longest first.

    >>> make_batches([1, 5, 4], limit=10)
    [[1, 2], [0]]
    """
    batches, limit = list[list[int]](), limit or BATCH_TOKENS
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= limit:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def find_blocks(model: nn.Module, layers: Layers) -> nn.ModuleList:
    """The model's list of L blocks: the one whose name and the files' prefix differ by leading words only, or that of its decoder."""

    def same(name: str) -> bool:
        return f".{name}".endswith(f".{layers.prefix}") or f".{layers.prefix}".endswith(f".{name}")

    def lists_in(part: nn.Module) -> dict[str, nn.ModuleList]:
        return {name: m for name, m in part.named_modules() if isinstance(m, nn.ModuleList) and len(m) == layers.blocks}

    lists = [blocks for name, blocks in lists_in(model).items() if same(name)]
    if len(lists) != 1 and hasattr(model, "get_decoder"):  # transformers loads it under other names
        lists = list(lists_in(model.get_decoder()).values())  # type: ignore[operator]
    if len(lists) != 1:
        what = f"{len(lists)} lists of {layers.blocks} blocks match '{layers.prefix}' in {type(model).__name__}"
        raise CheckpointError(what, fix=COMPARE_NOTHING)
    return lists[0]


class _Enough(Exception):
    """Raised inside a forward pass, after the last layer that is wanted."""
