"""The loss of a model on the completions of rows: the mean negative log-likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from recall_merge.models.tokens import EncodedRow


def row_loss(logits: Tensor, row: EncodedRow) -> float:
    """Mean negative log-likelihood, in nats, of the row's labelled tokens.    logits (t, vocabulary)"""
    return float(cross_entropy(logits[:-1].float(), torch.tensor(row.labels[1:]), ignore_index=-100))


@torch.inference_mode()
def mean_loss(model: Any, rows: Sequence[EncodedRow]) -> float:
    """Mean of `row_loss` over rows, each run on its own, so none is padded."""
    losses = [row_loss(model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0], row) for row in rows]
    return sum(losses) / len(losses)
