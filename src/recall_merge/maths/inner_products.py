"""Inner products of tensors, taken as one vector each or vector by vector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from recall_merge.maths.pieces import pieces

Vectors = Annotated[
    Literal["whole", "rows", "columns"],
    "what counts as one vector: the whole tensor, each row (along its last axis) or each column (along its first)",
]


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
