"""Typical samples at less cost: how long each way to embed the pool takes, and how good its samples are.

    python -m benchmarks.extraction RUN.yaml [--rounds 3]        a run with samples, such as configs/recall.yaml after `recall demo`

Each way chooses the samples of the run; the ways take turns. A choice is judged in the space of the default, the last block in float32:
    spread   mean squared distance of the pool's rows to their nearest sample, relative to as many rows drawn at random (mean of 20 draws)
    weights  largest difference of RECALL's weights from those of the default's samples
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from recall_merge.merging.forward import expert_tokenizer, hidden_states_at
from recall_merge.merging.layerwise import compute_weights
from recall_merge.merging.plan import Plan, make_plan
from recall_merge.merging.run import MergeRun, RecallWeights, load_run
from recall_merge.merging.samples import choose_samples
from recall_merge.models.tokens import render, token_ids
from recall_merge.runtime.progress import Silent

DEFAULT = "last block, float32"
WAYS = {
    DEFAULT: {},
    "last block, bfloat16": {"precision": "bfloat16"},
    "middle block, float32": {"space": "middle"},
    "middle block, bfloat16": {"space": "middle", "precision": "bfloat16"},
}


def plan_of(run: MergeRun, space: str = "last", precision: str = "float32") -> tuple[Plan, RecallWeights]:
    """The run's plan, with another space for its samples and another precision to find them."""
    assert run.samples is not None
    samples = run.samples.model_copy(update={"space": space})
    plan = make_plan(run.model_copy(update={"samples": samples}), writes=False)
    assert isinstance(plan.weights, RecallWeights)
    return plan, plan.weights.model_copy(update={"precision": precision})


def spread(states: Tensor, chosen: list[int]) -> float:
    """Mean squared distance to the nearest chosen row.    states (m, d)"""
    return float(torch.cdist(states.double(), states[chosen].double()).square().min(dim=1).values.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    run = load_run(args.run)
    ways = {name: plan_of(run, **settings) for name, settings in WAYS.items()}
    plan, rule = ways[DEFAULT]
    newest, tokenizer = plan.experts[-1], expert_tokenizer(plan, plan.experts[-1])
    texts = {row.index: "".join(render(row, tokenizer, template=plan.samples.template)) for row in plan.rows}
    tokens = token_ids(list(texts.values()), tokenizer, plan.samples.max_tokens)
    states = hidden_states_at(plan, newest, rule, tokens, [plan.base.layers.blocks])[0]
    position = {row: number for number, row in enumerate(texts)}
    draws = [random.Random(seed).sample(range(len(texts)), min(plan.samples.count, len(texts))) for seed in range(20)]
    at_random = statistics.mean(spread(states, draw) for draw in draws)

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    chosen: dict[str, list[int]] = {}
    for _ in range(args.rounds):
        for name, (own, precision) in ways.items():
            start = time.perf_counter()
            samples = choose_samples(own, precision, Silent())
            seconds[name].append(time.perf_counter() - start)
            chosen[name] = [position[sample.row] for sample in samples.rows]
    reference = compute_weights(plan).weights
    print(f"{len(texts)} rows, {sum(map(len, tokens))} tokens, {plan.samples.count} samples, {args.rounds} rounds, {plan.threads} threads")
    print(f"{'way':24} {'seconds / default, min median max':>36} {'spread':>8} {'weights':>9}")
    for name, (own, precision) in ways.items():
        ratios = sorted(one / other for one, other in zip(seconds[name], seconds[DEFAULT], strict=True))
        weights = compute_weights(replace(own, weights=precision)).weights
        times = f"{ratios[0]:.2f} {statistics.median(ratios):.2f} {ratios[-1]:.2f}"
        print(f"{name:24} {times:>36} {spread(states, chosen[name]) / at_random:8.3f} {float((weights - reference).abs().max()):9.4f}")


if __name__ == "__main__":
    main()
