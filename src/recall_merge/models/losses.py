"""How well a model says the completions of rows: its mean negative log-likelihood."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from recall_merge.training.fine_tuning import EncodedRow


@torch.inference_mode()
def mean_loss(model: Any, rows: Sequence[EncodedRow], *, progress: Callable[[int], None] = lambda _: None) -> float:
    """Mean over rows of the mean negative log-likelihood, in nats, of a row's tokens that have a label. Row by row, so never padded."""
    losses = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0, :-1].float()
        losses.append(float(cross_entropy(logits, torch.tensor(row.labels[1:]), ignore_index=-100)))
        progress(len(row.input_ids))
    return sum(losses) / len(losses)
