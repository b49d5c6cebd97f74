"""How an adapter changes one tensor of the base, and whether the change fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

from recall_merge.files.safetensors import StoredTensor, TensorSpec
from recall_merge.runtime.errors import short

if TYPE_CHECKING:
    from torch import Tensor

    from recall_merge.maths.deltas import Delta

MERGE_FIRST = "merge it into its base with PEFT (merge_and_unload), and give that folder"
COPY_AGAIN = "copy the adapter again"
OTHER_BASE = "give the base it was trained on"


@dataclass(frozen=True)
class FactorOfExperts:
    """A (E, r, in) or B (E, out, r), out of the matrix that PEFT stores; or one expert's, (r, in) or (out, r), or some rows of it."""

    stored: StoredTensor
    experts: int
    is_b: bool
    expert: int | None = None
    rows: range | None = None  # of B
    turned: bool = False

    @property
    def remote(self) -> Any:
        return self.stored.remote

    @property
    def spec(self) -> TensorSpec:
        height, width = self.stored.spec.shape
        one = (len(self.rows or range(height)), width // self.experts) if self.is_b else (height // self.experts, width)
        lead = (self.experts,) if self.expert is None else ()
        return TensorSpec(self.stored.spec.dtype, lead + (one[::-1] if self.turned else one))

    def read(self) -> Tensor:
        height, width = self.stored.spec.shape
        if self.is_b:
            rows = self.rows or range(height)
        else:
            rank, first = height // self.experts, self.expert or 0
            rows = range(height) if self.expert is None else range(first * rank, (first + 1) * rank)
        flat = self.stored.read(range(rows.start * width, rows.stop * width))
        if self.is_b:
            every = flat.view(len(rows), -1, self.experts).permute(2, 0, 1)
            factor = every if self.expert is None else every[self.expert]
        else:
            factor = flat.view(self.experts, -1, width) if self.expert is None else flat.view(-1, width)
        return factor.mT if self.turned else factor


@dataclass(frozen=True)
class JoinedFactors:
    """A or B of several products that change the rows of one tensor in turn: A's (r, in) below one another, B's (out, r) down the diagonal.

    With a number of experts E, of E such tensors at once: (E, r, in) and (E, out, r), or E = 1 for what all share.
    """

    parts: tuple[StoredTensor, ...]
    is_b: bool
    experts: int | None = None

    @property
    def remote(self) -> Any:
        return self.parts[0].remote

    @property
    def spec(self) -> TensorSpec:
        heights, widths = zip(*(part.spec.shape[-2:] for part in self.parts), strict=True)
        lead = () if self.experts is None else (self.experts,)
        return TensorSpec(self.parts[0].spec.dtype, (*lead, sum(heights), sum(widths) if self.is_b else widths[0]))

    def read(self) -> Tensor:
        import torch

        parts = [part.read() for part in self.parts]
        joined = torch.zeros(self.spec.shape, dtype=reduce(torch.promote_types, (part.dtype for part in parts)))
        row = column = 0
        for part in parts:
            height, width = part.shape[-2:]
            joined[..., row : row + height, column : column + width] = part
            row, column = row + height, column + width if self.is_b else 0
        return joined


Factor = StoredTensor | FactorOfExperts | JoinedFactors


@dataclass
class Edit:
    """A change of one tensor: replace it, add a low-rank product, rescale, set rows, add."""

    replace: StoredTensor | None = None
    up: Factor | None = None  # B (o, r), or (E, o, r) of E experts
    down: Factor | None = None  # A (r, i), or (E, r, i)
    scale: float = 1.0  # alpha / r, or alpha / sqrt(r)
    transpose: bool = False  # the base stores this tensor as (in, out), or it is an embedding
    magnitude: StoredTensor | None = None
    rows: StoredTensor | None = None
    row_ids: tuple[int, ...] = ()
    add: StoredTensor | None = None

    @property
    def parts(self) -> list[Factor]:
        return [part for part in (self.replace, self.up, self.down, self.magnitude, self.rows, self.add) if part is not None]

    @property
    def is_product(self) -> bool:
        """Whether it is a low-rank product alone."""
        return self.up is not None and (self.replace, self.magnitude, self.rows, self.add) == (None, None, None, None)

    def delta(self, base: Tensor) -> Delta:
        """What this edit adds to `base`, (*s) in float32 or better; as factors if it is a low-rank product alone."""
        product = self._product(base.dtype) if self.is_product else None
        return self.apply(base) - base if product is None else product

    def apply(self, base: Tensor) -> Tensor:
        """The edited tensor. `base` is in float32 or better."""
        from recall_merge.maths.deltas import dense

        edited = base if self.replace is None else self.replace.read().to(base.dtype)
        product = self._product(base.dtype)
        if product is not None:
            edited = edited + dense(product)
        if self.magnitude is not None:  # DoRA: m * (W + dW) / |W + dW|, one magnitude per output
            axis = 0 if self.transpose else 1  # of the inputs, over which the norm runs
            edited = edited * (self.magnitude.read().to(base.dtype).unsqueeze(axis) / edited.norm(dim=axis, keepdim=True))
        if self.rows is not None:
            edited = edited.clone()
            edited[list(self.row_ids)] = self.rows.read().to(base.dtype)
        if self.add is not None:
            edited = edited + self.scale * self.add.read().to(base.dtype)
        return edited

    def misfits(self, shape: tuple[int, ...], *, tokens: bool) -> Iterator[str]:
        """What does not fit a tensor of this shape, in words; a token tensor may have other rows."""
        start = shape if self.replace is None else self.replace.spec.shape
        if start[tokens:] != shape[tokens:]:
            yield f"in its shape {start}; the base has {shape}"
            return
        if (self.up is None) != (self.down is None):
            yield "by one of two factors; the other is missing"
        elif self.up is not None and self.down is not None:
            lead = self.up.spec.shape[:-2]  # the number of experts
            up, down = self.up.spec.shape[len(lead) :], self.down.spec.shape[len(lead) :]
            product = lead + up[:1] + down[1:]
            if up[1:] != down[:1]:
                yield f"by factors of shapes {self.up.spec.shape} and {self.down.spec.shape}, which cannot be multiplied"
            elif (product[::-1] if self.transpose else product) != start:
                yield f"in its shape {product[::-1] if self.transpose else product}; the base has {start}"
        if self.magnitude is not None and self.magnitude.spec.shape != start[self.transpose :][:1]:
            yield f"by magnitudes of shape {self.magnitude.spec.shape}; it has {start[self.transpose]} outputs"
        if self.rows is not None and self.rows.spec.shape != (len(self.row_ids), *start[1:]):
            yield f"in rows of shape {self.rows.spec.shape}; its config names {len(self.row_ids)} tokens"
        elif self.rows is not None and (wrong := [row for row in self.row_ids if not 0 <= row < start[0]]):
            yield f"in row {short(wrong[0])}; the base has {start[0]} rows"
        if self.add is not None and self.add.spec.shape != start:
            yield f"in its shape {self.add.spec.shape}; the base has {start}"
        for part in self.parts:
            if not part.spec.is_float:
                yield f"by numbers of dtype {part.spec.dtype}"

    def _product(self, dtype: Any) -> Any:
        if self.up is None or self.down is None:
            return None
        from recall_merge.maths.deltas import LowRank

        up, down = self.scale * self.up.read().to(dtype), self.down.read().to(dtype)
        if up.dim() > 2:  # methods know factors of matrices only
            return up @ down
        return LowRank(down.T, up.T) if self.transpose else LowRank(up, down)
