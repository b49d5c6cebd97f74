"""Walking over tensors in pieces that fit the processor's cache, where an operation costs a tenth of what it does in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

PIECE = 1 << 16
"""Elements of one piece; the same piece of a few experts then fits the second-level cache."""


def rows(tensor: Tensor) -> Tensor:
    """A tensor as a matrix of rows along its last axis; a vector or a number is one row.    (*s) -> (r, n)"""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1]) if tensor.ndim > 1 else tensor.reshape(1, -1)


def pieces(*tensors: Tensor, by_row: bool = False) -> Iterator[tuple[Tensor, ...]]:
    """Matching pieces of tensors of one shape, in order: flat, or some whole rows at a time.

    >>> [piece.tolist() for (piece,) in pieces(torch.ones(1, 2))]
    [[1.0, 1.0]]
    """
    views = [rows(tensor) if by_row else tensor.reshape(-1) for tensor in tensors]
    step = max(1, PIECE // max(1, views[0].shape[1])) if by_row else PIECE
    for start in range(0, len(views[0]), step):
        yield tuple(view[start : start + step] for view in views)


def in_pieces(function: Callable[..., Tensor], tensors: Sequence[Tensor], *, by_row: bool = False) -> Tensor:
    """function(piece, ...) over matching pieces, put together again.    tensors n of (*s) -> (*s)

    >>> in_pieces(torch.add, [torch.ones(2), torch.ones(2)])
    tensor([2., 2.])
    """
    merged = torch.empty_like(tensors[0], memory_format=torch.contiguous_format)
    for into, *given in pieces(merged, *tensors, by_row=by_row):
        into.copy_(function(*given))
    return merged
