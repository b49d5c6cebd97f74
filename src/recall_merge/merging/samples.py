"""Typical samples of the newest expert's rows, and the models that read them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recall_merge.files.experts import Expert, own_rows, own_tensor, own_tensors
from recall_merge.merging.nonfinite import refuse_nonfinite
from recall_merge.merging.plan import Plan
from recall_merge.merging.run import RecallWeights
from recall_merge.runtime.errors import CheckpointError, DataError, Unwalkable
from recall_merge.runtime.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from recall_merge.models.layerwise import LayerwiseForward
    from recall_merge.training.fine_tuning import EncodedRow


@dataclass(frozen=True)
class TypicalSample:
    """A row that stands for a cluster: its position in the file, the tokens the newest expert reads, and the cluster's size."""

    row: int
    tokens: int
    cluster: int


def typical_texts(plan: Plan, rule: RecallWeights, progress: Progress) -> tuple[list[str], tuple[TypicalSample, ...], list[str]]:
    """The texts of the typical samples, chosen by the newest expert from the pool of its rows; where they stand; and what to tell of it.

    Raises:
        DataError: if no row has any text.
        CheckpointError: if the expert cannot be run.
    """
    from recall_merge.maths.samples import typical_samples
    from recall_merge.models.hidden_states import representations, tokenize
    from recall_merge.models.tokens import render

    newest, wanted = plan.experts[-1], plan.samples
    tokenizer = expert_tokenizer(plan, newest)
    seen: dict[str, int] = {}  # text -> its first row
    for row in plan.rows:
        text = "".join(render(row, tokenizer, template=wanted.template))
        if row.plain.strip() or row.completion.strip():
            seen.setdefault(text, row.index)
    if not seen:
        raise DataError("no row has any text", where=wanted.path, fix="give rows with text")
    notes = []
    if len(seen) < len(plan.rows):
        notes.append(f"{len(plan.rows) - len(seen)} of {len(plan.rows)} rows are empty or repeat another and were left out")
    texts = list(seen)
    if len(texts) > wanted.pool:
        notes.append(f"{wanted.pool} of {len(texts)} rows were drawn for the pool (seed {plan.run.seed})")
        texts = [texts[place] for place in sorted(random.Random(plan.run.seed).sample(range(len(texts)), wanted.pool))]
    tokens = tokenize(texts, tokenizer, max_tokens=wanted.max_tokens)
    cut = sum(len(ids) == wanted.max_tokens for ids in tokens)
    if cut:
        notes.append(f"{cut} rows reach {wanted.max_tokens} tokens and were cut there")
    if len(texts) <= wanted.count:
        notes.append(f"there are {len(texts)} different rows, no more than the {wanted.count} samples asked for: all of them are typical")
        chosen, sizes = range(len(texts)), [1] * len(texts)
    else:
        blocks = plan.base.layers.blocks
        spaces = {"last": [blocks], "middle": [(blocks + 1) // 2], "several": sorted({(blocks + 3) // 4, (blocks + 1) // 2, blocks})}
        at = spaces[wanted.space]
        with progress.stage(f"choosing typical samples with {newest.name}", at[-1] + 1, "blocks") as advance:
            try:
                states = represent(plan, newest, rule, tokens, at, advance)
            except Unwalkable:
                model = build_expert(plan, newest, rule)
                states = representations(model, tokens, plan.base.layers, at=at, pooling=rule.pooling, threads=plan.threads)
        check_finite(plan, states, newest)
        typical = typical_samples(states.transpose(0, 1).flatten(1).numpy(), wanted.count, seed=plan.run.seed)
        chosen, sizes = typical.rows, typical.sizes
    samples = tuple(TypicalSample(seen[texts[place]], len(tokens[place]), size) for place, size in zip(chosen, sizes, strict=True))
    return [texts[place] for place in chosen], samples, notes


def labelled(plan: Plan, samples: Sequence[TypicalSample], tokenizer: Any) -> list[EncodedRow]:
    """Typical samples as tokens, cut like the pool's, with labels on the completion; on all tokens where none of it is left."""
    from recall_merge.training.fine_tuning import EncodedRow, encode_rows
    from recall_merge.training.settings import TrainSettings

    by_index = {row.index: row for row in plan.rows}
    rows = encode_rows([by_index[sample.row] for sample in samples], tokenizer, TrainSettings(template=plan.samples.template))
    cut = [EncodedRow(row.input_ids[: plan.samples.max_tokens], row.labels[: plan.samples.max_tokens]) for row in rows]
    return [row if any(label != -100 for label in row.labels[1:]) else EncodedRow(row.input_ids, row.input_ids) for row in cut]


def represent(
    plan: Plan, expert: Expert, rule: RecallWeights, tokens: Sequence[Sequence[int]], at: Sequence[int], advance: Callable[[int], None]
) -> Tensor:
    """An expert's representations of texts at some layers, rising, with one of its blocks in memory at a time.    -> (len(at), m, d)"""
    import torch

    states = []
    with walk(plan, expert, rule, tokens) as going:
        for layer in range(at[-1] + 1):
            state = going.step(parameters(plan, expert, rule, layer, tokens))
            if layer in at:
                states.append(state)
            advance(1)
    return torch.stack(states)


def walk(plan: Plan, expert: Expert, rule: RecallWeights, tokens: Sequence[Sequence[int]]) -> LayerwiseForward:
    """An expert's forward pass over texts, block by block."""
    from recall_merge.models.layerwise import LayerwiseForward

    spec = expert.spec(plan.base.embedding)
    rows = plan.base.vocabulary_size if spec is None else spec.shape[0]
    folder, layers = plan.base.folder, plan.base.layers
    return LayerwiseForward(folder, tokens, layers, dtype=rule.precision, vocabulary_size=rows, pooling=rule.pooling, threads=plan.threads)


def parameters(plan: Plan, expert: Expert, rule: RecallWeights, layer: int, tokens: Iterable[Iterable[int]]) -> dict[str, Tensor]:
    """What an expert runs with at one layer; tables of tokens hold only the rows that the texts need, where they can be read by rows."""
    import torch

    rows = sorted({token for ids in tokens for token in ids}) if layer == 0 else []
    found = {}
    for name in plan.base.tensors:
        if plan.base.layers.of(name) != layer:
            continue
        if name in plan.base.token_tensors and expert.comes_in_pieces(name):
            found[name] = own_rows(expert, plan.base, name, rows, plan.merges, dtype=getattr(torch, rule.precision))
        else:
            found[name] = own_tensor(expert, plan.base, name, plan.merges)
    return found


def build_expert(plan: Plan, expert: Expert, rule: RecallWeights) -> Any:
    from recall_merge.models.load import build_model

    tensors = own_tensors(expert, plan.base, plan.merges)
    return build_model(plan.base.folder, tensors, dtype=rule.precision, vocabulary_size=len(tensors[plan.base.embedding]))


def expert_tokenizer(plan: Plan, expert: Expert) -> Any:
    """The expert's own tokenizer where vocabularies differ, else the base's: then all models read the same tokens."""
    from recall_merge.files.vocabulary import read_vocabulary
    from recall_merge.models.load import load_tokenizer

    own = plan.vocabulary is not None and read_vocabulary(expert.folder) is not None
    return load_tokenizer(expert.folder if own else plan.base.folder)


def check_finite(plan: Plan, states: Tensor, expert: Expert) -> None:
    if not states.isfinite().all():
        refuse_nonfinite(plan)
        fix = "its weights are finite, so the forward pass overflows: look at the training that made it"
        raise CheckpointError(f"expert '{expert.name}' represents the samples by numbers that are not finite", where=expert.folder, fix=fix)
