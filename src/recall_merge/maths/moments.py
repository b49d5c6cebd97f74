"""Second moments of a linear layer's inputs, sketched as a few directions and a diagonal; and the least-squares problem that they pose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from recall_merge.maths.deltas import Dense, Factored, LowRank, Weights
from recall_merge.maths.trimming import Start

HELD = 2048  # rows of inputs that a sketch holds
OVERSAMPLED, ROUNDS = 8, 4  # columns beside those that are wanted, and products with x^T x, of the search for the leading directions


@dataclass(frozen=True)
class Moment:
    """The inputs x of a linear map, by an estimate of E[x x^T], G = factor factor^T + diag(rest); and the importance of its outputs."""

    factor: Float[Tensor, "i r"]
    rest: Float[Tensor, " i"]
    """>= 0, like the factor float32 or better."""
    gradient: Float[Tensor, " o"] | None = None
    """Mean over samples of the sum over tokens of g^2, where g is the gradient of the log-likelihood of the model's own predictions with
    respect to the map's output; None where it was not computed."""

    @property
    def diagonal(self) -> Float[Tensor, " i"]:
        """diag(G)."""
        return self.factor.square().sum(1) + self.rest

    def dense(self) -> Float[Tensor, "i i"]:
        """G itself."""
        return self.factor @ self.factor.mT + torch.diag(self.rest)

    def to(self, device: torch.device) -> Moment:
        """The same on another device."""
        return Moment(self.factor.to(device), self.rest.to(device), None if self.gradient is None else self.gradient.to(device))

    def shrunk(self, offdiagonal: float, *, unit: bool = True) -> Moment:
        """G with its off-diagonal entries times `offdiagonal`, in float64; with `unit`, of mean diagonal 1, or the identity if G is 0."""
        factor, rest = self.factor.double(), self.rest.double()
        mean = float(self.diagonal.double().mean()) if unit else 1.0
        if mean == 0:
            return identity(len(rest), self.rest.device)
        return Moment(factor * (offdiagonal / mean) ** 0.5, (rest + (1 - offdiagonal) * factor.square().sum(1)) / mean)


def identity(size: int, device: torch.device | None = None) -> Moment:
    """The moment that prefers no direction, for inputs that nothing is known about."""
    ones = torch.ones(size, dtype=torch.float64, device=device)
    return Moment(ones.new_zeros(size, 0), ones)


class Sketch:
    """The second moment of inputs that arrive in blocks, in memory that does not grow with their number.

    At most `held` rows wait. Before there are more, their leading rows take their place (`leading_rows`), and the least of them is lost: an
    incremental SVD, truncated far beyond the `rank` directions that are wanted (Ross et al. 2008, doi:10.1007/s11263-007-0075-7). The
    diagonal is summed in float64, that of one block in float32.
    """

    def __init__(self, rank: int, draw: Start, *, held: int = HELD) -> None:
        self.count = 0
        self._rank, self._draw, self._held = rank, draw, max(held, 2 * ROUNDS * (rank + OVERSAMPLED))
        self._rows = torch.empty(0)  # (at most held, i), of which the first `_filled` wait
        self._filled = 0
        self._squares: Tensor | float = 0.0  # (i,)

    def add(self, x: Float[Tensor, "n i"]) -> None:
        """Take in more inputs."""
        for rows in x.split(self._held // 2):
            if self._filled + len(rows) > self._held:
                leading = leading_rows(self._rows[: self._filled], self._rank, self._draw)
                self._filled = len(leading)
                self._rows[: self._filled] = leading
            if (needed := self._filled + len(rows)) > len(self._rows):
                larger = x.new_empty(min(self._held, max(needed, 2 * len(self._rows))), x.shape[1], dtype=torch.float32)
                if self._filled:
                    larger[: self._filled] = self._rows[: self._filled]
                self._rows = larger
            self._rows[self._filled : needed] = rows
            self._filled = needed
        self._squares += x.float().square().sum(0).double()  # of few rows: ten times as fast as in float64, and as good
        self.count += len(x)

    def moment(self) -> Moment:
        """The leading directions of the inputs' mean x x^T, and a diagonal that keeps its own as it is. At least one input has come."""
        assert isinstance(self._squares, Tensor), "a sketch of no inputs"
        rows = leading_rows(self._rows[: self._filled], self._rank, self._draw)[: self._rank]
        factor = rows.mT.double() / self.count**0.5
        rest = (self._squares / self.count - factor.square().sum(1)).clamp(min=0)
        return Moment(factor.float(), rest.float())


def weighted_sum(moments: Sequence[Moment], weights: Sequence[float], rank: int, draw: Start) -> Moment:
    """sum_q w_q G_q, w_q >= 0, cut to `rank` directions where it has more. Its diagonal is kept.

    >>> one, three = Moment(torch.zeros(2, 0), torch.tensor([4.0, 0.0])), Moment(torch.zeros(2, 0), torch.tensor([0.0, 4.0]))
    >>> weighted_sum([one, three], [0.25, 0.75], 1, lambda: lambda shape: torch.ones(shape)).diagonal
    tensor([1., 3.])
    """
    factor = torch.cat([weight**0.5 * moment.factor for moment, weight in zip(moments, weights, strict=True)], dim=1)
    if factor.shape[1] > rank:
        factor = leading_rows(factor.mT, rank, draw)[:rank].mT
    diagonal = sum((weight * moment.diagonal for moment, weight in zip(moments, weights, strict=True)), torch.zeros_like(moments[0].rest))
    return Moment(factor, (diagonal - factor.square().sum(1)).clamp(min=0))


def leading_rows(x: Float[Tensor, "n i"], rank: int, draw: Start) -> Float[Tensor, "m i"]:
    """Few rows S for many, with S^T S near x^T x: the largest singular values of x times their right singular vectors, largest first.

    m <= 4 (rank + 8), of which the first `rank` are good to about 1e-3 of x^T x in the spectral norm, and the others less so. A randomised
    block Krylov method (Musco and Musco 2015, arXiv:1504.05477): x is projected onto the span of (x^T x)^j W, j = 1..4, W random. Where
    that would be as wide as x is, nothing is lost. In float32, apart from the eigenvectors of the projection.
    """
    from scipy.linalg import eigh  # subtle: torch's own (divide and conquer) fails on some matrices of low rank

    columns = rank + OVERSAMPLED
    if min(x.shape) <= ROUNDS * columns:
        basis = torch.linalg.qr(x.mT).Q  # (i, min(n, i)): all that the rows span
    else:
        block, blocks = draw()((x.shape[1], columns)).to(x.device) - 0.5, []
        for _ in range(ROUNDS):
            block = torch.linalg.qr(x.mT @ (x @ block)).Q
            blocks.append(block)
        basis = torch.linalg.qr(torch.cat(blocks, dim=1)).Q
    seen = (x @ basis).double()
    values, vectors = (torch.from_numpy(part).to(x.device) for part in eigh((seen.mT @ seen).cpu().numpy()))
    return (basis @ vectors.float() * values.clamp(min=0).sqrt().float()).mT.flip(0)


def least_squares(deltas: Factored, moments: Sequence[Moment], weights: Weights, *, ridge: float = 0.0) -> Dense:
    """The change that answers every expert's typical inputs as that expert would.    (o, i)

    argmin_D sum_q w_q tr((D - delta_q) G_q (D - delta_q)^T) + ridge |D|^2 = (sum_q w_q delta_q G_q) (sum_q w_q G_q + ridge I)^-1.

    deltas k of (o, i), G_q (i, i). With G_q = E_q[x x^T] each term is w_q E_q|D x - delta_q x|^2, over the inputs x of expert q.
    A moment is a low-rank factor and a diagonal, so the system is diag(d) + V V^T with V (i, k r). While k r < i, Woodbury's identity
    inverts it at a cost linear in i. Of a low-rank delta U L only the rows of L are solved for: U (L G_q (..)^-1). In float64, as moments.

    >>> see, hide = (Moment(torch.zeros(2, 0).double(), rest) for rest in torch.eye(2).double())
    >>> least_squares([torch.tensor([[1.0, 5.0]]), torch.tensor([[5.0, 2.0]])], [see, hide], [0.5, 0.5])
    tensor([[1., 2.]], dtype=torch.float64)
    """
    diagonal, factor = _system(moments, weights, ridge)
    ups, rows, whole = [], [], diagonal.new_zeros(deltas[0].shape)
    for delta, moment, weight in zip(deltas, moments, weights, strict=True):
        if isinstance(delta, LowRank):
            ups.append(delta.up.double())
            rows.append(_seen(delta.down, moment, weight))
        else:
            whole += _seen(delta, moment, weight)
    change = _divide(whole, diagonal, factor) if whole.any() else whole
    if rows:
        change.addmm_(torch.cat(ups, dim=1), _divide(torch.cat(rows), diagonal, factor))
    return change


def _system(moments: Sequence[Moment], weights: Weights, ridge: float) -> tuple[Tensor, Tensor]:
    """d (i,) and V (i, k r) of sum_q w_q G_q + ridge I = diag(d) + V V^T."""
    diagonal = sum((weight * moment.rest for moment, weight in zip(moments, weights, strict=True)), torch.zeros_like(moments[0].rest))
    return diagonal + ridge, torch.cat([weight**0.5 * moment.factor for moment, weight in zip(moments, weights, strict=True)], dim=1)


def condition_bound(moments: Sequence[Moment], weights: Weights, *, ridge: float) -> float:
    """An upper bound of the system's condition number, from eigenvalues in [min d, max d + |V|^2]: the solve can lose 1e-16 times this."""
    diagonal, factor = _system(moments, weights, ridge)
    return float((diagonal.max() + torch.linalg.matrix_norm(factor, 2).square()) / diagonal.min()) if factor.numel() else 1.0


def seen_by(change: Float[Tensor, "n i"], moment: Moment) -> Float[Tensor, "n i"]:
    """change G, in the moment's dtype or the change's, whichever is the wider."""
    factor = moment.factor.to(torch.promote_types(change.dtype, moment.factor.dtype))
    change = change.to(factor.dtype)
    return torch.addmm(change * moment.rest, change @ factor, factor.mT)


def divided(seen: Float[Tensor, "n i"], moment: Moment) -> Float[Tensor, "n i"]:
    """seen G^-1, in float64; the diagonal of G is above 0."""
    return _divide(seen.double(), moment.rest.double(), moment.factor.double())


def _seen(change: Float[Tensor, "n i"], moment: Moment, weight: float) -> Float[Tensor, "n i"]:
    """weight * change G, in float64."""
    return seen_by(change.double(), moment).mul_(weight)


def _divide(seen: Float[Tensor, "n i"], diagonal: Float[Tensor, " i"], factor: Float[Tensor, "i kr"]) -> Float[Tensor, "n i"]:
    """seen (diag(d) + V V^T)^-1; by Woodbury's identity, (..)^-1 = D^-1 - D^-1 V (I + V^T D^-1 V)^-1 V^T D^-1."""
    size, columns = factor.shape
    if columns >= size:
        return torch.linalg.solve(factor @ factor.mT + torch.diag(diagonal), seen, left=False)
    left = seen / diagonal
    if not columns:
        return left
    scaled = factor / diagonal.unsqueeze(1)  # D^-1 V
    core = factor.mT @ scaled
    core.diagonal().add_(1)
    return left.sub_(torch.linalg.solve(core, (left @ factor).mT).mT @ scaled.mT)
