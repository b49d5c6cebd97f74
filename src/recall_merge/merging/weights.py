"""Merge weights, layer by layer, and the typical samples that they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recall_merge.maths.weights import ablate, outside_blocks, softmax_weights
from recall_merge.merging.plan import Plan
from recall_merge.merging.run import RecallWeights


@dataclass(frozen=True)
class TypicalSample:
    """A row that stands for a cluster: its position in the file, its length in tokens, and the cluster's size."""

    row: int
    tokens: int
    cluster: int


@dataclass(frozen=True)
class TypicalSamples:
    """The typical samples of the newest expert's rows; their texts as the models read them; notes on how rows were handled."""

    texts: list[str]
    rows: tuple[TypicalSample, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class MergeWeights:
    """Weights by layer, and how they came about.

    Attributes:
        models: the models that were compared, newest last; 'base' comes first where the base is one of them.
        weights: (L + 2, models), float64; each row sums to 1.
        similarity: (L + 1, models), float64, layers 0..L; None where weights do not come from hidden states.
        samples: the typical samples, in the order of their rows.
        notes: what a reader of the result should know.
        losses: of every expert on the typical samples; None where weights do not come from losses.
    """

    models: tuple[str, ...]
    weights: Tensor
    similarity: Tensor | None = None
    samples: tuple[TypicalSample, ...] = ()
    notes: tuple[str, ...] = ()
    losses: Mapping[str, float] | None = None

    def of_experts(self, layer: int) -> list[float]:
        """The experts' weights at one layer, in their order, without the base's."""
        return self.weights[layer, self.models[0] == "base" :].tolist()

    def table(self, values: Tensor) -> dict[str, Any]:
        """Similarity or weights in the form of the record: one row per layer, from 0 on."""
        rows = values.tolist()
        return {"experts": list(self.models), "layers": list(range(len(rows))), "rows": rows}


def given_weights(plan: Plan) -> MergeWeights:
    """The weights that the run itself gives, with a row for every layer."""
    names = tuple(expert.name for expert in plan.experts)
    weights = torch.tensor(plan.weights, dtype=torch.float64)
    return MergeWeights(names, weights if weights.ndim == 2 else weights.repeat(plan.base.layers.last + 1, 1))


def weights_from_similarity(plan: Plan, rule: RecallWeights, similarity: Tensor, samples: TypicalSamples) -> MergeWeights:
    """Weights of the first i layers, whose similarity (i, n) is known, and of the layer that follows them."""
    weights = softmax_weights(similarity, temperature=rule.temperature)
    weights = outside_blocks(ablate(weights, rule.ablation, seed=plan.run.seed), rule.outside_blocks)
    return MergeWeights(tuple(model.name for model in plan.compared), weights, similarity, samples.rows, samples.notes)
