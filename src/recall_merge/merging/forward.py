"""An expert's forward pass as the merge needs it: block by block with one layer of it in memory, or as a whole model."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from recall_merge.files.experts import Expert, own_rows, own_tensor, own_tensors
from recall_merge.merging.inputs import embedding_rows, tokenizer_of
from recall_merge.merging.placement import BATCHES
from recall_merge.merging.plan import Plan
from recall_merge.merging.run import RecallWeights
from recall_merge.merging.unsound import refuse_nonfinite
from recall_merge.models.tokens import token_ids
from recall_merge.runtime.device import is_full
from recall_merge.runtime.errors import CheckpointError

if TYPE_CHECKING:
    from recall_merge.models.layerwise import LayerwiseForward

Tokens = Sequence[Sequence[int]]
T = TypeVar("T")


def expert_tokenizer(plan: Plan, expert: Expert) -> Any:
    """What `tokenizer_of` gives for a plan."""
    return tokenizer_of(expert, plan.base, plan.vocabulary, plan.speaker)


def tokens_of(plan: Plan, expert: Expert, texts: Sequence[str]) -> list[list[int]]:
    """Texts as the token ids that an expert reads."""
    return token_ids(texts, expert_tokenizer(plan, expert), plan.samples.max_tokens)


def start_forward(plan: Plan, expert: Expert, rule: RecallWeights, tokens: Tokens, *, one_by_one: bool = False) -> LayerwiseForward:
    """A forward pass over texts that waits before each block for that block's parameters."""
    from recall_merge.models.layerwise import LayerwiseForward

    return LayerwiseForward(
        plan.base.folder,
        tokens,
        plan.base.layers,
        dtype=rule.precision,
        vocabulary_size=embedding_rows(expert, plan.base),
        pooling=rule.pooling,
        threads=plan.threads,
        one_by_one=one_by_one,
        device=plan.device,
        batch_tokens=plan.batch_tokens,
    )


def layer_parameters(plan: Plan, expert: Expert, rule: RecallWeights, layer: int, tokens: Tokens) -> dict[str, Tensor]:
    """An expert's parameters at one layer. The embedding holds only the rows that the texts need, where it can be read by rows."""
    rows = sorted({token for ids in tokens for token in ids})
    parameters = {}
    for name in plan.base.tensors:
        if plan.base.layers.of(name) != layer:
            continue
        if layer == 0 and name in plan.base.token_tensors and expert.comes_in_pieces(name):
            parameters[name] = own_rows(expert, plan.base, name, rows, plan.merges, dtype=getattr(torch, rule.precision))
        else:
            parameters[name] = own_tensor(expert, plan.base, name, plan.merges)
    return parameters


def hidden_states_at(
    plan: Plan, expert: Expert, rule: RecallWeights, tokens: Tokens, layers: Iterable[int], advance: Callable[[int], None] = lambda _: None
) -> Tensor:
    """An expert's pooled hidden states of texts at some layers, in rising order, block by block, or NotLayerwise.    -> (layers, m, d)"""
    wanted = list(layers)
    states = []
    with start_forward(plan, expert, rule, tokens) as forward:
        for layer in range(wanted[-1] + 1):
            reached = forward.step(layer_parameters(plan, expert, rule, layer, tokens))
            if layer in wanted:
                states.append(reached)
            advance(1)
    return check_finite(plan, expert, torch.stack(states).cpu())


def whole_hidden_states_at(plan: Plan, expert: Expert, rule: RecallWeights, tokens: Tokens, layers: Iterable[int]) -> Tensor:
    """The same from a whole model, for architectures that cannot be run block by block."""
    from recall_merge.models.hidden_states import pooled_hidden_states

    model, at = load_expert(plan, expert, rule).to(plan.device), list(layers)
    threads = plan.threads if plan.device.type == "cpu" else 1
    options: dict[str, Any] = {"pooling": rule.pooling, "threads": threads, "batch_tokens": plan.batch_tokens}
    return check_finite(plan, expert, pooled_hidden_states(model, tokens, plan.base.layers, at=at, **options))


def load_expert(plan: Plan, expert: Expert, rule: RecallWeights) -> Any:
    """An expert as a whole transformers model, on the processor."""
    from recall_merge.models.load import build_model

    tensors = own_tensors(expert, plan.base, plan.merges)
    return build_model(plan.base.folder, tensors, dtype=rule.precision, vocabulary_size=len(tensors[plan.base.embedding]))


def where_it_fits(plan: Plan, work: Callable[[Plan], T], notes: list[str], *, batches: Sequence[int] = BATCHES) -> T:
    """What `work` gives for the plan on its device; where its memory is too small, in smaller batches, and at last on the processor.

    `notes` learns of that.
    """
    if plan.device.type == "cpu":
        return work(plan)
    attempts: list[tuple[str, dict[str, Any]]] = [
        (f"in batches of {tokens:,} tokens" if tokens > 1 else "text by text", {"batch_tokens": tokens}) for tokens in batches
    ]
    attempts.append(("on the processor", {"device": torch.device("cpu")}))
    for words, changes in attempts:
        try:
            result = work(replace(plan, **changes))
        except RuntimeError as error:
            if not is_full(error) or "device" in changes:
                raise
        else:
            if words != attempts[0][0]:
                notes.append(f"{plan.device} has too little memory to run models {attempts[0][0]}: they ran {words}")
            return result
        gc.collect()  # subtle: the error and the batch that raised it hold each other, and with them what lies in the device's memory
    raise AssertionError("the processor returns or raises")


def check_finite(plan: Plan, expert: Expert, states: Tensor) -> Tensor:
    """The hidden states, refused if they are not finite; the error names the model and the tensors that cause it."""
    if not states.isfinite().all():
        refuse_nonfinite(plan)
        fix = "its weights are finite, so the forward pass overflows: check the training that made it"
        raise CheckpointError(f"expert '{expert.name}' has hidden states that are not finite", where=expert.folder, fix=fix)
    return states
