"""Typical samples: the rows of the newest expert's data nearest to the centroids of their clusters."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from recall_merge.maths.samples import typical_samples
from recall_merge.merging.forward import expert_tokenizer, hidden_states_at, where_it_fits, whole_hidden_states_at
from recall_merge.merging.plan import Plan
from recall_merge.merging.run import RecallWeights, Space
from recall_merge.models.tokens import EncodedRow, encode_rows, render_rows, token_ids
from recall_merge.runtime.errors import DataError, NotLayerwise
from recall_merge.runtime.progress import Progress


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


def choose_samples(plan: Plan, rule: RecallWeights, progress: Progress, *, space: Space = "last") -> TypicalSamples:
    """Cluster the newest expert's hidden states of its own rows, and take the row nearest to each centroid.

    Args:
        space: which hidden states, where the run does not say.
    """
    newest, wanted = plan.experts[-1], plan.samples
    tokenizer = expert_tokenizer(plan, newest)
    first_row = _distinct_texts(plan, tokenizer)
    texts, notes = list(first_row), []
    if len(texts) < len(plan.rows):
        notes.append(f"{len(plan.rows) - len(texts)} of {len(plan.rows)} rows are empty or repeat another and were left out")
    if len(texts) > wanted.pool:
        notes.append(f"{wanted.pool} of {len(texts)} rows were drawn for the pool (seed {plan.run.seed})")
        texts = [texts[i] for i in sorted(random.Random(plan.run.seed).sample(range(len(texts)), wanted.pool))]
    tokens = token_ids(texts, tokenizer, wanted.max_tokens)
    if cut := sum(len(ids) == wanted.max_tokens for ids in tokens):
        notes.append(f"{cut} rows reach {wanted.max_tokens} tokens and were cut there")
    if len(texts) <= wanted.count:
        notes.append(f"there are {len(texts)} different rows, no more than the {wanted.count} samples asked for: all of them are typical")
        chosen, sizes = list(range(len(texts))), [1] * len(texts)
    else:
        layers = clustered_layers(wanted.space or space, plan.base.layers.blocks)
        with progress.stage(f"choosing typical samples with {newest.name}", layers[-1] + 1, "blocks") as advance:

            def embed(plan: Plan) -> Tensor:
                try:
                    return hidden_states_at(plan, newest, rule, tokens, layers, advance)
                except NotLayerwise:
                    return whole_hidden_states_at(plan, newest, rule, tokens, layers)

            states = where_it_fits(plan, embed, notes)
        typical = typical_samples(states.transpose(0, 1).flatten(1).numpy(), wanted.count, seed=plan.run.seed)
        chosen, sizes = list(typical.rows), list(typical.sizes)
    rows = tuple(TypicalSample(first_row[texts[i]], len(tokens[i]), size) for i, size in zip(chosen, sizes, strict=True))
    return TypicalSamples([texts[i] for i in chosen], rows, tuple(notes))


def clustered_layers(space: Space, blocks: int) -> list[int]:
    """The layers whose hidden states are clustered, of 0..L, L = `blocks`.

    >>> [clustered_layers(space, 30) for space in ("embedding", "middle", "last", "several")]
    [[0], [15], [30], [8, 15, 30]]
    """
    middle = (blocks + 1) // 2
    return {"embedding": [0], "middle": [middle], "last": [blocks], "several": sorted({(blocks + 3) // 4, middle, blocks})}[space]


def encode_samples(plan: Plan, samples: Sequence[TypicalSample], tokenizer: Any) -> list[EncodedRow]:
    """Typical samples as tokens, cut like the pool's, with labels on the completion, or on all tokens where the cut leaves none of it."""
    by_index = {row.index: row for row in plan.rows}
    chosen, template = [by_index[sample.row] for sample in samples], plan.samples.template
    return encode_rows(chosen, tokenizer, template=template, max_length=plan.samples.max_tokens, label_cut=True)


def _distinct_texts(plan: Plan, tokenizer: Any) -> dict[str, int]:
    """Each different text, as the model reads it, with its first row."""
    first_row: dict[str, int] = {}
    wanted = plan.samples
    texts = plan.texts or ["".join(text) for text in render_rows(plan.rows, tokenizer, template=wanted.template, where=wanted.path)]
    for row, text in zip(plan.rows, texts, strict=True):
        if row.plain.strip() or row.completion.strip():
            first_row.setdefault(text, row.index)
    if not first_row:
        raise DataError("no row has any text", where=plan.samples.path, fix="give rows with text")
    return first_row
