"""The one pass over all models, layer by layer: hidden states, similarity, weights and, where a result is wanted, the merge.

The weights of a layer need only the hidden states up to it. So every model is read once, and memory holds one layer of each beside the
samples' hidden states. Only architectures that cannot be run block by block are run as whole models, through the same interface.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from recall_merge.files.checkpoint import Checkpoint
from recall_merge.files.experts import FullExpert
from recall_merge.maths.similarity import similarity
from recall_merge.merging.forward import (
    Tokens,
    check_finite,
    layer_parameters,
    start_forward,
    tokens_of,
    where_it_fits,
    whole_hidden_states_at,
)
from recall_merge.merging.plan import Plan
from recall_merge.merging.run import DEFAULT_RECALL, LossWeights, RecallWeights
from recall_merge.merging.samples import TypicalSamples, choose_samples
from recall_merge.merging.weights import MergeWeights, given_weights, weights_from_losses, weights_from_similarity
from recall_merge.runtime.errors import NotLayerwise
from recall_merge.runtime.parallel import in_order
from recall_merge.runtime.progress import Progress, Silent

if TYPE_CHECKING:
    from recall_merge.models.layerwise import LayerwiseForward

Visit = Callable[[int, Plan, "Tensor"], None]
"""Takes a layer, the plan (with the bytes of that layer in memory, where they are held), and hidden states (models, samples, width)."""
Merge = Callable[[Plan, MergeWeights, Sequence[str]], None]
"""Merges and writes the tensors named, by the weights known so far."""


class HiddenStates(Protocol):
    """A source of hidden states: visits layers 0..L in order and returns notes for the reader of the result."""

    def __call__(self, plan: Plan, rule: RecallWeights, texts: Sequence[str], visit: Visit, *, hold: bool) -> Sequence[str]: ...


def compute_weights(plan: Plan, progress: Progress | None = None) -> MergeWeights:
    """The merge weights of a plan: given by the run, or from hidden states or losses.

    Raises:
        DataError: if no row has any text.
        CheckpointError: if a model cannot be run, or gives numbers that are not finite.
    """
    progress = progress or Silent()
    start = prepare(plan, progress)
    return start if isinstance(start, MergeWeights) else run_pass(plan, start, progress=progress)


def prepare(plan: Plan, progress: Progress) -> MergeWeights | TypicalSamples:
    """What must be known before tensors are merged: all weights, or only the typical samples where weights follow layer by layer."""
    rule = plan.weights
    if isinstance(rule, LossWeights):
        return weights_from_losses(plan, rule, choose_samples(plan, DEFAULT_RECALL, progress), progress)
    if not isinstance(rule, RecallWeights):
        return given_weights(plan)
    samples = choose_samples(plan, rule, progress)
    return samples if plan.single_pass else run_pass(plan, samples, progress=progress)


def run_pass(
    plan: Plan, samples: TypicalSamples, *, merge: Merge | None = None, source: HiddenStates | None = None, progress: Progress | None = None
) -> MergeWeights:
    """Compare all models layer by layer; with `merge`, which reports its own progress, merge each layer as soon as its weights are known.

    Hidden states come from this process, with one layer in memory at a time, unless another source is given.
    """
    rule = plan.weights
    assert isinstance(rule, RecallWeights)
    rows: list[Tensor] = []  # (n,) for each layer so far

    def weights() -> MergeWeights:
        return weights_from_similarity(plan, rule, torch.stack(rows), samples)

    def visit(layer: int, held: Plan, states: Tensor) -> None:
        rows.append(similarity(states, kernel=rule.kernel, bandwidth=rule.bandwidth))
        if merge is not None:
            merge(held, weights(), plan.names_of_layer[layer])
        else:
            advance(1)

    layers = plan.base.layers
    with (Silent() if merge or progress is None else progress).stage("comparing hidden states", layers.blocks + 1, "layers") as advance:
        notes = (source or hidden_states_here)(plan, rule, samples.texts, visit, hold=merge is not None)
    if merge is not None:
        merge(plan, weights(), plan.names_of_layer[layers.last])
    return replace(weights(), notes=tuple(dict.fromkeys((*samples.notes, *notes))))


def hidden_states_here(plan: Plan, rule: RecallWeights, texts: Sequence[str], visit: Visit, *, hold: bool) -> list[str]:
    """Block by block, or whole models from where an architecture does not allow that; `hold` keeps a layer's bytes while it is visited.

    Where a device turns out to be too small, all models start again, and the layers that were visited stay as they are.
    """
    tokens = [tokens_of(plan, expert, texts) for expert in plan.compared]
    visited, notes = 0, list[str]()

    def run(placed: Plan) -> None:
        nonlocal visited
        try:
            with ExitStack() as stack:
                pairs = zip(placed.compared, tokens, strict=True)
                forwards = [stack.enter_context(start_forward(placed, expert, rule, ids)) for expert, ids in pairs]
                for layer in range(plan.base.layers.blocks + 1):
                    held, states = _step(placed, rule, forwards, tokens, layer, hold=hold and layer == visited)
                    if layer == visited:
                        visit(layer, replace(held, device=plan.device), states)
                        visited += 1
                    del held  # nothing holds its blocks when the next ones are read
        except NotLayerwise as error:
            left = range(visited, plan.base.layers.blocks + 1)
            pairs = zip(placed.compared, tokens, strict=True)
            states = torch.stack([whole_hidden_states_at(placed, expert, rule, ids, left) for expert, ids in pairs], dim=1)
            for layer, reached in zip(left, states, strict=True):
                visit(layer, plan, reached)
                visited += 1
            notes.append(whole_note(error))

    where_it_fits(plan, run, notes)
    return notes


def _step(
    plan: Plan, rule: RecallWeights, forwards: Sequence[LayerwiseForward], tokens: Sequence[Tokens], layer: int, *, hold: bool
) -> tuple[Plan, Tensor]:
    """One layer of all models: the plan, with the bytes of that layer in memory if they are held, and the hidden states."""
    from recall_merge.models.layerwise import step

    held = _with_layer_in_memory(plan, layer) if hold else plan
    pairs = zip(held.compared, tokens, strict=True)
    states = step(forwards, [partial(layer_parameters, held, expert, rule, layer, ids) for expert, ids in pairs])
    return held, torch.stack([check_finite(plan, expert, reached.cpu()) for expert, reached in zip(plan.compared, states, strict=True)])


def _with_layer_in_memory(plan: Plan, layer: int) -> Plan:
    """The plan, with its checkpoints' tensors of one layer in memory, except token tensors, of which texts need a few rows only."""
    names = [name for name in plan.names_of_layer[layer] if name not in plan.base.token_tensors]

    def held(checkpoint: Checkpoint, wanted: list[str]) -> Checkpoint:
        return replace(checkpoint, held=dict(zip(wanted, in_order(checkpoint.read, wanted, plan.threads), strict=True)))

    merged = [name for name in names if plan.merges(name)]
    experts = [replace(expert, source=held(expert.source, merged)) if isinstance(expert, FullExpert) else expert for expert in plan.experts]
    return replace(plan, base=held(plan.base, names), experts=tuple(experts))


def whole_note(error: NotLayerwise) -> str:
    """The note that whole models were run, and why."""
    return f"whole models were run, not block by block: {error.faults[0].what}"
