"""Work on tensors in pieces that fit the processor's cache, and inner products computed so.

An operation on a piece costs a tenth of what it costs on a large tensor, and intermediate results are as small as a piece. An accelerator
takes a tensor as one piece: starting an operation is what costs it time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from torch import Tensor

PIECE = 1 << 16
"""Numbers per piece: the same piece of a few experts fits the second-level cache."""
Vectors = Annotated[
    Literal["whole", "rows", "columns"],
    "what counts as one vector: the whole tensor, each row (along its last axis) or each column (along its first)",
]


def rows(tensor: Float[Tensor, "*s"]) -> Float[Tensor, "r n"]:
    """A tensor as a matrix of rows along its last axis; a vector or a number is one row."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1]) if tensor.ndim > 1 else tensor.reshape(1, -1)


def pieces(*tensors: Float[Tensor, "*s"], by_row: bool = False) -> Iterator[tuple[Tensor, ...]]:
    """Matching pieces of tensors of one shape, in order: flat, or some whole rows at a time.

    >>> [piece.tolist() for (piece,) in pieces(torch.ones(1, 2))]
    [[1.0, 1.0]]
    """
    views = [rows(tensor) if by_row else tensor.reshape(-1) for tensor in tensors]
    piece = PIECE if tensors[0].is_cpu else max(1, tensors[0].numel())
    step = max(1, piece // max(1, views[0].shape[1])) if by_row else piece
    for start in range(0, len(views[0]), step):
        yield tuple(view[start : start + step] for view in views)


def in_pieces(function: Callable[..., Tensor], tensors: Sequence[Float[Tensor, "*s"]], *, by_row: bool = False) -> Float[Tensor, "*s"]:
    """function(piece, ...) over matching pieces of all tensors, put together again.

    >>> in_pieces(torch.add, [torch.ones(2), torch.ones(2)])
    tensor([2., 2.])
    """
    result = torch.empty_like(tensors[0], memory_format=torch.contiguous_format)
    for target, *parts in pieces(result, *tensors, by_row=by_row):
        target.copy_(function(*parts))
    return result


def columns_last(tensor: Tensor, vectors: Vectors) -> Tensor:
    """The tensor with its vectors along the last axis."""
    return tensor.movedim(0, -1) if vectors == "columns" and tensor.ndim else tensor


def inner_products(tensors: Sequence[Float[Tensor, "*s"]], vectors: Vectors = "whole") -> Float[Tensor, "r n n"]:
    """Of n tensors with r vectors each, in float64; r = 1 for whole.

    Summed in the tensors' precision within a piece or row, in float64 over the pieces. No BLAS: its sums depend on where a tensor lies
    in memory, and the same merge must give the same bytes.

    >>> inner_products([torch.tensor([1.0, 2.0]), torch.tensor([0.0, 3.0])]).tolist()
    [[[5.0, 6.0], [6.0, 9.0]]]
    """
    n = len(tensors)
    first, second = torch.triu_indices(n, n).tolist()
    sums = []
    for piece in pieces(*(columns_last(tensor, vectors) for tensor in tensors), by_row=vectors != "whole"):
        products = [(piece[p] * piece[q]).sum(-1) for p, q in zip(first, second, strict=True)]
        sums.append(torch.stack(products, dim=-1).double())
    total = torch.stack(sums).sum(0, keepdim=True) if vectors == "whole" else torch.cat(sums)
    matrices = total.new_zeros(len(total), n, n)
    matrices[:, first, second] = matrices[:, second, first] = total
    return matrices
