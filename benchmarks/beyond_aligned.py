"""Candidates to beat `aligned`: python -m benchmarks.beyond_aligned SCENARIO --set data=.. --set model=.. --out FOLDER

SCENARIO and FOLDER are those of a bench that has been run with `aligned` among its methods: its experts and statistics are used. For every
seed each candidate merges the experts, and each merge is scored on rows that nobody was trained on. Printed as mean over seeds:

    kept    mean over tasks of (L_base - L) / (L_base - L_expert), L the mean loss of the completions: the share of the experts' gain
    unseen  mean over tasks that nobody learnt of L - L_base, in nats: below 0 is better than the base

`moments uncut` reads the experts' typical rows, which no merge from statistics can: it says what there is to gain. Results are in
docs/log.md. Llama architectures only. About six minutes per seed on one thread.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from recall_merge.bench.bench import store_of
from recall_merge.bench.design import Design, make_design
from recall_merge.bench.jobs import Merged, StatisticsJob, Store
from recall_merge.bench.run_job import make_run
from recall_merge.bench.scenario import load_scenario
from recall_merge.files.experts import own_tensors, widen
from recall_merge.files.rows import read_rows
from recall_merge.maths.deltas import LowRank
from recall_merge.maths.methods.informed import aligned
from recall_merge.maths.methods.spectral import tsv
from recall_merge.maths.moments import Moment
from recall_merge.merging.merge import merge_in_memory
from recall_merge.merging.plan import Plan, make_plan
from recall_merge.merging.weights import mean_loss
from recall_merge.models.load import build_model, load_tokenizer
from recall_merge.models.tokens import EncodedRow, encode_rows

HELD_OUT = 16  # rows of each task
OFFDIAGONAL, RIDGE = 0.9, 1e-6  # aligned's own defaults

Tensors = dict[str, Tensor]
Solve = Callable[[Tensor, list[Any], list[Moment]], Tensor]
"""Merges one linear map: base, low-rank deltas, moments of the inputs -> the merged map."""


def merged_by(plan: Plan, method: str, options: dict[str, Any] | None = None, **keys: Any) -> Tensors:
    """What `recall merge` would write, by another method or with other keys of the run."""
    run = plan.run.model_dump(mode="json", exclude_defaults=True) | {"method": method, "options": options or {}} | keys
    return merge_in_memory(make_plan(type(plan.run).model_validate(run), writes=False))[0]


def each_map(plan: Plan, solve: Solve) -> Tensors:
    """The merge by statistics, with another solution for every linear map that all statistics cover."""
    tensors = merged_by(plan, "aligned")
    for name in tensors:
        moments = [moment[0] for stats in plan.statistics if stats and (moment := stats.moment(name))]
        if len(moments) == len(plan.experts):
            base = widen(plan.base.read(name))
            deltas = [expert.delta(name, base) for expert in plan.experts]
            if all(isinstance(delta, LowRank) for delta in deltas):
                tensors[name] = solve(base, deltas, moments)
    return tensors


def tsv_of_parts(base: Tensor, deltas: list[LowRank], moments: list[Moment]) -> Tensor:
    """aligned is a sum of parts, delta_q G_q (sum_p G_p + ridge I)^-1 (equal weights): orthogonalise the parts before they are added."""
    shrunk = [moment.shrunk(OFFDIAGONAL).dense() / len(moments) for moment in moments]
    whole = sum(shrunk, RIDGE * torch.eye(base.shape[1], dtype=torch.float64))
    downs = [torch.linalg.solve(whole, (delta.down.double() @ own).mT).mT for delta, own in zip(deltas, shrunk, strict=True)]
    parts = [LowRank(delta.up, down.float()) for delta, down in zip(deltas, downs, strict=True)]
    return tsv(base, parts, [1 / len(parts)] * len(parts))


def parts_that_add_up(quiet: float) -> Solve:
    """sum_q delta_q G_q (G_q + quiet sum_{p != q} G_p + k ridge I)^-1: each part answers its own expert's inputs, and is silenced on those
    of the others by less than in aligned (quiet = 1). Where several experts read the same, parts add up to more than their mean."""

    def solve(base: Tensor, deltas: list[LowRank], moments: list[Moment]) -> Tensor:
        shrunk = [moment.shrunk(OFFDIAGONAL).dense() for moment in moments]
        whole = quiet * sum(shrunk, torch.zeros_like(shrunk[0])) + len(moments) * RIDGE * torch.eye(base.shape[1], dtype=torch.float64)
        merged = base.double()
        for delta, own in zip(deltas, shrunk, strict=True):
            down = torch.linalg.solve(whole + (1 - quiet) * own, (delta.down.double() @ own).mT).mT
            merged = merged + delta.up.double() @ down
        return merged.float()

    return solve


def from_deltas(floor: float) -> Solve:
    """aligned without statistics: training moves a map along the inputs that it reads, so delta^T delta stands for E[x x^T].

    `floor` is added to its diagonal, as a share of its mean.
    """

    def solve(base: Tensor, deltas: list[LowRank], _: list[Moment]) -> Tensor:
        moments = []
        for delta in deltas:
            values, vectors = torch.linalg.eigh(delta.up.double().mT @ delta.up.double())
            factor = delta.down.double().mT @ (vectors * values.clamp(min=0).sqrt())  # (i, r), factor factor^T = delta^T delta
            moments.append(Moment(factor, torch.full((base.shape[1],), floor * float(factor.square().sum()) / base.shape[1])))
        return aligned(base, deltas, [1 / len(deltas)] * len(deltas), moments=moments, offdiagonal=1.0)

    return solve


@contextmanager
def recorded_inputs(model: nn.Module) -> Iterator[Tensors]:
    """What every linear map of the blocks read in the last pass, by the name of its tensor.    (tokens, i)"""
    inputs: Tensors = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda _, args: inputs.__setitem__(name, args[0][0])

    maps = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name]
    handles = [module.register_forward_pre_hook(hook(f"{name}.weight")) for name, module in maps]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def moments_of(plan: Plan, number: int, rows: Sequence[EncodedRow]) -> Tensors:
    """E[x x^T] of each map's inputs under one expert on its typical rows; mean diagonal 1, the rest shrunk.    (i, i) float64"""
    model = build_model(plan.base.folder, own_tensors(plan.experts[number], plan.base, plan.merges))
    passes: list[Tensors] = []
    with recorded_inputs(model) as inputs:
        for row in rows:
            model(input_ids=torch.tensor([row.input_ids]), use_cache=False)
            passes.append(dict(inputs))
    moments = {}
    for name in passes[0]:
        x = torch.cat([inputs[name] for inputs in passes]).double()
        moment = x.mT @ x / len(x)
        moment = moment / moment.diagonal().mean().clamp(min=1e-30)
        moments[name] = OFFDIAGONAL * moment + (1 - OFFDIAGONAL) * torch.diag(moment.diagonal())
    return moments


def uncut(plan: Plan, moments: Sequence[Tensors]) -> Tensors:
    """aligned from whole moments, which are as large as the layers."""
    tensors = merged_by(plan, "aligned")
    for name in moments[0]:
        base = widen(plan.base.read(name))
        answers = torch.zeros(base.shape, dtype=torch.float64)
        for expert, own in zip(plan.experts, moments, strict=True):
            delta = expert.delta(name, base)
            assert isinstance(delta, LowRank)
            answers += delta.up.double() @ (delta.down.double() @ own[name]) / len(moments)
        whole = sum((own[name] / len(moments) for own in moments), RIDGE * torch.eye(base.shape[1], dtype=torch.float64))
        tensors[name] = base + torch.linalg.solve(whole, answers.mT).mT.float()
    return tensors


def candidates(plan: Plan, newest: dict[str, str], moments: Sequence[Tensors]) -> dict[str, Callable[[], Tensors]]:
    """Every way to merge the experts of one seed."""
    return {
        **{method: lambda method=method: merged_by(plan, method) for method in ("linear", "ties", "tsv", "regmean", "aligned")},
        "aligned, ridge 1e-3": lambda: merged_by(plan, "aligned", {"ridge": 1e-3}),
        "aligned, scale 1.2": lambda: merged_by(plan, "aligned", {"scale": 1.2}),
        "aligned, parts add up": lambda: each_map(plan, parts_that_add_up(0.5)),
        "aligned, RECALL's weights": lambda: merged_by(plan, "aligned", weights={"recall": {"temperature": 1.0}}, samples=newest),
        "aligned, rising scale": lambda: merged_by(plan, "aligned", scale_by_layer={"alpha": 0.8, "beta": 0.4}),
        "aligned, falling scale": lambda: merged_by(plan, "aligned", scale_by_layer={"alpha": 1.2, "beta": -0.4}),
        "aligned, TSV of the parts": lambda: each_map(plan, tsv_of_parts),
        **{f"aligned, no statistics, {floor}": lambda floor=floor: each_map(plan, from_deltas(floor)) for floor in (0.01, 0.1, 1.0)},
        "aligned, moments uncut": lambda: uncut(plan, moments),
    }


def plan_of(design: Design, store: Store, seed: int) -> tuple[Plan, list[StatisticsJob]]:
    """The plan of the scenario's `aligned` for one seed, and the jobs of its statistics."""
    for trial in design.trials:
        model = trial.jobs[-1].model
        if trial.seed == seed and isinstance(model, Merged) and model.run["method"] == "aligned":
            return make_plan(make_run(model, store), writes=False), [job for _, job in model.statistics]
    raise SystemExit("the scenario has no `aligned` among its multi-model trials")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", required=True)
    parser.add_argument("--seeds", type=int, nargs="*")
    args = parser.parse_args()
    torch.set_num_threads(1)
    scenario = load_scenario(args.scenario, dict(pair.split("=", 1) for pair in args.set) | {"out": args.out})
    design = make_design(scenario)
    store, settings = store_of(scenario), scenario.settings(None, 0)
    tokenizer = load_tokenizer(design.base.folder)

    def held_out(file: str, skip: int) -> list[EncodedRow]:
        return encode_rows(read_rows(scenario.data / file)[skip : skip + HELD_OUT], tokenizer, **settings.encoding)

    tasks = {task.name: held_out(task.train, design.train_rows[task.name]) for task in scenario.tasks}
    unseen = {task.name: held_out(task.test, scenario.rows.test or 0) for task in scenario.unseen}

    def losses(tensors: Tensors, rows: dict[str, list[EncodedRow]]) -> dict[str, float]:
        model = build_model(design.base.folder, tensors)
        return {task: mean_loss(model, encoded) for task, encoded in rows.items()}

    results: dict[str, list[tuple[float, float]]] = {}
    for seed in args.seeds or scenario.seeds:
        plan, jobs = plan_of(design, store, seed)
        moments = []
        for number, (job, stats) in enumerate(zip(jobs, plan.statistics, strict=True)):
            assert stats is not None
            typical = [job.model.rows[row] for row in stats.facts["rows"]]
            moments.append(moments_of(plan, number, encode_rows(typical, tokenizer, **settings.encoding)))
        base = losses({name: widen(plan.base.read(name)) for name in plan.specs}, tasks | unseen)
        own: dict[str, float] = {}
        for expert in plan.experts:
            own |= losses(own_tensors(expert, plan.base, plan.merges), {expert.name: tasks[expert.name]})
        newest = {"path": str(store.keep_rows(jobs[-1].model.rows))}
        for name, merge in candidates(plan, newest, moments).items():
            loss = losses(merge(), tasks | unseen)
            kept = mean((base[task] - loss[task]) / (base[task] - own[task]) for task in tasks)
            change = mean(loss[task] - base[task] for task in unseen)
            results.setdefault(name, []).append((kept, change))
            print(f"seed {seed}  {name:28} kept {kept:.3f}  unseen {change:+.3f}", flush=True)
    print(f"\n| candidate | kept | unseen |\n| --- | --- | --- |  ({len(next(iter(results.values())))} seeds, {HELD_OUT} rows per task)")
    for name, pairs in results.items():
        kept, change = ((mean(column), stdev(column) if len(column) > 1 else 0.0) for column in zip(*pairs, strict=True))
        print(f"| {name} | {kept[0]:.3f} ± {kept[1]:.3f} | {change[0]:+.3f} ± {change[1]:.3f} |")
    Path(args.out, "beyond_aligned.json").write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
