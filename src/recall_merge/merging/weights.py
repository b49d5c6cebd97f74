"""Merge weights, layer by layer: given by the run, from the similarity of hidden states, or from losses (LM-Cocktail)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from recall_merge.files.experts import Expert, own_tensor
from recall_merge.maths.weights import ablate, outside_blocks, softmax_weights
from recall_merge.merging.forward import expert_tokenizer, layer_parameters, load_expert, start_forward, where_it_fits
from recall_merge.merging.placement import BATCHES
from recall_merge.merging.plan import Plan
from recall_merge.merging.run import DEFAULT_RECALL, LossWeights, RecallWeights
from recall_merge.merging.samples import TypicalSample, TypicalSamples, encode_samples
from recall_merge.models.load import running
from recall_merge.models.tokens import EncodedRow
from recall_merge.runtime.errors import CheckpointError, NotLayerwise
from recall_merge.runtime.notebook import html_table, shaded
from recall_merge.runtime.progress import Progress


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

    def lines(self) -> Iterator[tuple[str, list[float], list[float]]]:
        """By layer its name, the weights, and the similarity to the newest of the models before it, if there is any.

        Neighbours with equal numbers, to four digits, share a line.
        """
        similarity = [] if self.similarity is None else self.similarity[:, :-1].tolist()
        both = [*zip_longest(self.weights.tolist(), similarity, fillvalue=list[float]())]

        def digits(layer: int) -> list[str]:
            return [f"{number:.4f}" for numbers in both[layer] for number in numbers]

        for _, group in groupby(range(len(both)), key=digits):
            first, *more = group
            yield (f"{first} to {more[-1]}" if more else str(first), *both[first])

    def _repr_html_(self) -> str:
        compared = self.models[:-1] if self.similarity is not None else ()
        head = ["layer", *(f"w {name}" for name in self.models), *(f"S {name}" for name in compared)]
        labels, weights, similarity = zip(*self.lines(), strict=True)
        columns = [shaded(column, ".4f") for part in (weights, similarity) for column in zip_longest(*part)]
        return html_table("merge weights w, similarity S to the newest", head, zip(labels, *columns, strict=True))

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


def weights_from_losses(plan: Plan, rule: LossWeights, samples: TypicalSamples, progress: Progress) -> MergeWeights:
    """Weights that are the same at every layer. CheckpointError if a model cannot be run, or its loss is not finite."""
    losses, notes = dict[str, float](), list[str]()
    for expert in plan.experts:
        rows = encode_samples(plan, samples.rows, expert_tokenizer(plan, expert))
        with progress.stage(f"loss of {expert.name}", plan.base.layers.last + 1, "layers") as advance:
            losses[expert.name] = where_it_fits(plan, partial(_loss, expert, rows, advance), notes, batches=BATCHES[-1:])
        if not math.isfinite(losses[expert.name]):
            raise CheckpointError(f"the loss of expert '{expert.name}' is not finite", where=expert.folder, fix="look at its training")
    row = softmax_weights(-torch.tensor([[*losses.values()]], dtype=torch.float64), temperature=rule.temperature)
    weights = row.repeat(plan.base.layers.last + 1, 1)
    return MergeWeights(tuple(losses), weights, samples=samples.rows, notes=(*samples.notes, *dict.fromkeys(notes)), losses=losses)


def _loss(expert: Expert, rows: Sequence[EncodedRow], advance: Callable[[int], None], plan: Plan) -> float:
    """`mean_loss` of an expert: layer by layer, or of the whole model."""
    try:
        return _layerwise_loss(plan, expert, rows, advance)
    except NotLayerwise:
        return mean_loss(load_expert(plan, expert, DEFAULT_RECALL).to(plan.device), rows)


def _layerwise_loss(plan: Plan, expert: Expert, rows: Sequence[EncodedRow], advance: Callable[[int], None]) -> float:
    """`mean_loss` of an expert with one of its layers in memory at a time."""
    layers, tokens = plan.base.layers, [row.input_ids for row in rows]
    losses = [0.0] * len(rows)

    def reduce(logits: Tensor, batch: list[int]) -> Tensor:
        (row,) = batch
        losses[row] = _row_loss(logits[0], rows[row])
        return torch.empty(0)

    with start_forward(plan, expert, DEFAULT_RECALL, tokens, one_by_one=True) as forward:
        for layer in range(layers.blocks + 1):
            forward.step(layer_parameters(plan, expert, DEFAULT_RECALL, layer, tokens))
            advance(1)
        head = layer_parameters(plan, expert, DEFAULT_RECALL, layers.last, tokens)
        if plan.base.is_tied:  # the whole table, of which the first layer has only the rows of the tokens
            head[plan.base.embedding] = own_tensor(expert, plan.base, plan.base.embedding, plan.merges)
        forward.finish(head, reduce)
        advance(1)
    return sum(losses) / len(losses)


@torch.inference_mode()
def mean_loss(model: Any, rows: Sequence[EncodedRow]) -> float:
    """Mean over rows of the mean negative log-likelihood, in nats, of a row's labelled tokens. Each row runs on its own: none is padded."""
    ids = (torch.tensor([row.input_ids], device=model.device) for row in rows)
    with running(model):
        losses = [_row_loss(model(input_ids=read, use_cache=False).logits[0], row) for read, row in zip(ids, rows, strict=True)]
    return sum(losses) / len(losses)


def _row_loss(logits: Tensor, row: EncodedRow) -> float:
    labels = torch.tensor(row.labels[1:], device=logits.device)
    return float(cross_entropy(logits[:-1].float(), labels, ignore_index=-100))
