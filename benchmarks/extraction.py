"""Typical samples at less cost: time of each way to embed the pool, and how good the samples are that it picks.

    python benchmarks/extraction.py RUN.yaml [--rounds 3]        a run with samples, such as configs/recall.yaml after `recall demo`

Each way chooses the samples of the run; the ways take turns. A choice is judged in the space of the default, the last block in float32:
    spread   mean squared distance of the pool's rows to their nearest sample, over that of as many rows drawn at random (mean of 20 draws)
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

from recall_merge.merging.plan import Plan, make_plan
from recall_merge.merging.run import MergeRun, RecallWeights, load_run
from recall_merge.merging.samples import expert_tokenizer, represent, typical_texts
from recall_merge.merging.weights import compute_weights
from recall_merge.models.tokens import render, tokenize
from recall_merge.runtime.progress import Silent

WAYS = {
    "last block, float32": {},
    "last block, bfloat16": {"precision": "bfloat16"},
    "middle block, float32": {"space": "middle"},
    "middle block, bfloat16": {"space": "middle", "precision": "bfloat16"},
}


def plan_of(run: MergeRun, told: dict[str, str]) -> tuple[Plan, RecallWeights]:
    """The run's plan with another space or precision for its samples."""
    assert run.samples is not None
    samples = run.samples.model_copy(update={key: value for key, value in told.items() if key == "space"})
    plan = make_plan(run.model_copy(update={"samples": samples}), writes=False)
    assert isinstance(plan.weights, RecallWeights)
    return plan, plan.weights.model_copy(update={key: value for key, value in told.items() if key == "precision"})


def spread(states: Tensor, chosen: list[int]) -> float:
    """Mean squared distance to the nearest chosen row.    states (m, d)"""
    return float(torch.cdist(states.double(), states[chosen].double()).square().min(dim=1).values.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    run = load_run(args.run)
    ways = {name: plan_of(run, told) for name, told in WAYS.items()}
    plan, rule = ways["last block, float32"]
    newest, tokenizer = plan.experts[-1], expert_tokenizer(plan, plan.experts[-1])
    texts = {row.index: "".join(render(row, tokenizer, template=plan.samples.template)) for row in plan.rows}
    tokens = tokenize(list(texts.values()), tokenizer, max_tokens=plan.samples.max_tokens)
    states = represent(plan, newest, rule, tokens, [plan.base.layers.blocks], lambda _: None)[0]
    place = {row: number for number, row in enumerate(texts)}
    draws = [random.Random(seed).sample(range(len(texts)), min(plan.samples.count, len(texts))) for seed in range(20)]
    at_random = statistics.mean(spread(states, draw) for draw in draws)

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    chosen: dict[str, list[int]] = {}
    for _ in range(args.rounds):
        for name, (own, precision) in ways.items():
            start = time.perf_counter()
            _, samples, _ = typical_texts(own, precision, Silent())
            seconds[name].append(time.perf_counter() - start)
            chosen[name] = [place[sample.row] for sample in samples]
    reference = compute_weights(plan).weights
    print(f"{len(texts)} rows, {sum(map(len, tokens))} tokens, {plan.samples.count} samples, {args.rounds} rounds, {plan.threads} threads")
    print(f"{'way':24} {'seconds / default, min median max':>36} {'spread':>8} {'weights':>9}")
    for name, (own, precision) in ways.items():
        ratios = sorted(one / other for one, other in zip(seconds[name], seconds["last block, float32"], strict=True))
        weights = compute_weights(replace(own, weights=precision)).weights
        told = f"{ratios[0]:.2f} {statistics.median(ratios):.2f} {ratios[-1]:.2f}"
        print(f"{name:24} {told:>36} {spread(states, chosen[name]) / at_random:8.3f} {float((weights - reference).abs().max()):9.4f}")


if __name__ == "__main__":
    main()
