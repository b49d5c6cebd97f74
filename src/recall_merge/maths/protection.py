"""What a change of a linear map does to the answers of earlier tasks, how to keep that small, and which directions are free for a new one.

A map W (o, i) changes by D. Earlier task q, whose inputs have the second moment G_q = E_q[x x^T] (`maths/moments.py`), then sees its
answers move by E_q|D x|^2 = tr(D G_q D^T). With

    S = sum_q G_q / E_q|W x|^2                                   each task by the size of its own answers

tr(D S D^T) is the sum over tasks of the share by which answers move, and

    loss + strength * mean over maps of tr(D S D^T)

trains a task that leaves earlier ones alone, without a row of theirs. It is elastic weight consolidation in the space of functions: of an
adapter's product D = B A, and not of its factors (EWC-LoRA, arXiv:2602.17559; TAK, arXiv:2602.17385). Everything is linear in i.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from recall_merge.maths.deltas import Delta, Dense, LowRank
from recall_merge.maths.moments import Moment, divided, leading_rows, seen_by
from recall_merge.maths.trimming import Start

LEAST = 1e-3  # added to an energy before others are divided by it, as a share of its mean over directions


def energy(change: Delta, moment: Moment) -> float:
    """E|D x|^2 = tr(D G D^T) over inputs with the moment G.    D (o, i) or as factors, G (i, i)

    >>> energy(torch.tensor([[1.0, 2.0]]), Moment(torch.zeros(2, 0), torch.tensor([3.0, 1.0])))
    7.0
    """
    return float(pull(change, moment).energy if isinstance(change, LowRank) else (seen_by(change, moment) * change).sum())


@dataclass(frozen=True)
class Pull:
    """tr(D S D^T) of a low-rank change D = U L, and its gradients."""

    energy: Tensor
    up: Float[Tensor, "o r"]
    down: Float[Tensor, "r i"]


def pull(change: LowRank, moment: Moment) -> Pull:
    """tr(U L S (U L)^T) = sum (U^T U) * (L S L^T), its gradients 2 U (L S L^T) and 2 (U^T U) (L S). D is never made dense.

    >>> found = pull(LowRank(torch.tensor([[2.0]]), torch.tensor([[1.0, 0.0]])), Moment(torch.zeros(2, 0), torch.ones(2)))
    >>> found.energy.item(), found.up.item(), found.down.tolist()
    (4.0, 4.0, [[8.0, 0.0]])
    """
    seen = seen_by(change.down, moment)  # L S
    inner, outer = seen @ change.down.mT, change.up.mT @ change.up
    return Pull((outer * inner).sum(), 2 * change.up @ inner, 2 * outer @ seen)


def dense_pull(change: Dense, moment: Moment) -> tuple[Tensor, Dense]:
    """tr(D S D^T) of a dense change (o, i), and its gradient 2 D S."""
    seen = seen_by(change, moment)
    return (seen * change).sum(), 2 * seen


def free_directions(new: Moment, old: Moment, count: int) -> Float[Tensor, "n i"]:
    """Directions with much energy under the new task's inputs and little under the old ones', strongest first, of length 1; n <= count.

    The leading u of S_new u = mu (S_old + e I) u, e a thousandth of S_old's mean diagonal. S_new counts by its leading directions F, so
    u = (S_old + e I)^-1 F y, y the leading eigenvectors of F^T (S_old + e I)^-1 F: r of them, at a cost linear in i.
    """
    raised = Moment(old.factor, old.rest + LEAST * float(old.diagonal.mean()))
    rows = divided(new.factor.mT.double(), raised)  # F^T (S_old + e I)^-1
    values, vectors = torch.linalg.eigh(rows @ new.factor.double())
    count = min(count, int((values > values[-1] * 1e-6).sum()))
    found = vectors.mT.flip(0)[:count] @ rows
    return (found / found.norm(dim=1, keepdim=True)).float()


def shared_directions(new: Moment, old: Moment, count: int, draw: Start) -> Float[Tensor, "n i"]:
    """The leading eigenvectors of S_new + S_old, each of trace 1, strongest first, of length 1: what both tasks use."""
    parts = [moment.factor.mT / float(moment.diagonal.sum()) ** 0.5 for moment in (new, old)]
    found = leading_rows(torch.cat(parts), count, draw)[:count]
    return found / found.norm(dim=1, keepdim=True)
