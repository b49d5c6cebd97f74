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
import re
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
from recall_merge.files.row_sources import RowSource
from recall_merge.maths.deltas import LowRank
from recall_merge.maths.low_rank import singular
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


def in_row_space(deltas: list[LowRank]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """An orthonormal basis (i, m) of the deltas' row space; in it D_q^T D_q / |D_q|^2, (m, m), and the lower factor (r, m) of each."""
    basis = torch.linalg.qr(torch.cat([delta.down.double() for delta in deltas]).mT)[0]
    owns, downs = [], [delta.down.double() @ basis for delta in deltas]
    for delta, down in zip(deltas, downs, strict=True):
        own = down.mT @ (delta.up.double().mT @ delta.up.double()) @ down
        owns.append(own / own.trace().clamp(min=1e-30))
    return basis, owns, downs


def flow(time: float) -> Solve:
    """WUDI (Cheng et al. 2025, arXiv:2503.08099), without statistics: from the sum of the deltas down sum_q |(M - D_q) D_q^T|^2 / |D_q|^2.

    The paper takes 300 steps of Adam; this is the gradient flow after `time`, in closed form. With H = sum_q 2 D_q^T D_q / |D_q|^2 and
    R = sum_q D_q 2 D_q^T D_q / |D_q|^2, M = M_0 e^(-time H) + R (I - e^(-time H)) H^-1. All of it lies in the row space of the deltas.
    """

    def solve(base: Tensor, deltas: list[LowRank], _: list[Moment]) -> Tensor:
        basis, owns, downs = in_row_space(deltas)
        changes = [delta.up.double() @ down for delta, down in zip(deltas, downs, strict=True)]
        answers = [change @ (2 * own) for change, own in zip(changes, owns, strict=True)]
        values, vectors = torch.linalg.eigh(2 * torch.stack(owns).sum(0))
        left = torch.exp(-time * values.clamp(min=0))
        gone = torch.where(values > 1e-12, (1 - left) / values.clamp(min=1e-12), time)
        merged = torch.stack(changes).sum(0) @ (vectors * left) + torch.stack(answers).sum(0) @ (vectors * gone)
        return base + (merged @ vectors.mT @ basis.mT).float()

    return solve


def kept_off(base: Tensor, deltas: list[LowRank], factors: Sequence[Tensor], share: float, inside: float = 0.0) -> Tensor:
    """The sum of the deltas, each off the leading directions of the others' factors (i, n), which hold `share` of their energy.

    `inside` of each is left there.
    """
    merged = base.double()
    for number, delta in enumerate(deltas):
        left, values, _ = torch.linalg.svd(torch.cat([*factors[:number], *factors[number + 1 :]], dim=1), full_matrices=False)
        energy = values.square().cumsum(0) / values.square().sum()
        taken = left[:, : int((energy < share).sum()) + 1]
        down = delta.down.double()
        merged = merged + delta.up.double() @ (down - (1 - inside) * down @ taken @ taken.mT)
    return merged.float()


def filtered(share: float, inside: float) -> Solve:
    """`null_space`, without statistics, but for `inside` of each delta, which is left where the others are."""

    def solve(base: Tensor, deltas: list[LowRank], _: list[Moment]) -> Tensor:
        parts = [singular(delta) for delta in deltas]
        return kept_off(base, deltas, [part.right * (part.values / part.values.norm()) for part in parts], share, inside)

    return solve


def filtered_by_moments(share: float) -> Solve:
    """The same off the leading directions of what the others read, which statistics know, in place of what their deltas read."""

    def solve(base: Tensor, deltas: list[LowRank], moments: list[Moment]) -> Tensor:
        return kept_off(base, deltas, [moment.factor.double() / float(moment.diagonal.sum()) ** 0.5 for moment in moments], share)

    return solve


def soft_filter(floor: float) -> Solve:
    """The same without a threshold: sum_q D_q (I + H_q / floor)^-1, H_q = sum_{p != q} D_p^T D_p / |D_p|^2."""

    def solve(base: Tensor, deltas: list[LowRank], _: list[Moment]) -> Tensor:
        basis, owns, downs = in_row_space(deltas)
        whole, one = torch.stack(owns).sum(0), torch.eye(basis.shape[1], dtype=torch.float64)
        parts = [
            delta.up.double() @ torch.linalg.solve(one + (whole - own) / floor, down.mT).mT
            for delta, own, down in zip(deltas, owns, downs, strict=True)
        ]
        return base + (torch.stack(parts).sum(0) @ basis.mT).float()

    return solve


def shares(floor: float, keep: float) -> Solve:
    """Without statistics: sum_q D_q S_q, S_q = T^-1/2 (G_q + keep I) T^-1/2, G_q = D_q^T D_q / |D_q|^2, T = sum_p G_p + floor I."""

    def solve(base: Tensor, deltas: list[LowRank], _: list[Moment]) -> Tensor:
        basis, owns, downs = in_row_space(deltas)
        one = torch.eye(basis.shape[1], dtype=torch.float64)
        values, vectors = torch.linalg.eigh(torch.stack(owns).sum(0) + floor * one)
        root = (vectors / values.sqrt()) @ vectors.mT
        parts = [
            delta.up.double() @ (down @ root @ (own + keep * one) @ root) for delta, own, down in zip(deltas, owns, downs, strict=True)
        ]
        return base + (torch.stack(parts).sum(0) @ basis.mT).float()

    return solve


def shares_of_moments(base: Tensor, deltas: list[LowRank], moments: list[Moment]) -> Tensor:
    """aligned, but sum_q D_q T^-1/2 G_q T^-1/2 in place of sum_q D_q G_q T^-1: no part grows."""
    shrunk = [moment.shrunk(OFFDIAGONAL).dense().double() / len(moments) for moment in moments]
    values, vectors = torch.linalg.eigh(sum(shrunk, RIDGE * torch.eye(base.shape[1], dtype=torch.float64)))
    root = (vectors / values.clamp(min=RIDGE).sqrt()) @ vectors.mT
    downs = [delta.down.double() @ root @ own @ root for delta, own in zip(deltas, shrunk, strict=True)]
    return base + sum((delta.up.double() @ down for delta, down in zip(deltas, downs, strict=True)), torch.zeros(())).float()


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


def candidates(plan: Plan, newest: dict[str, str], moments: Callable[[], Sequence[Tensors]]) -> dict[str, Callable[[], Tensors]]:
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
        **{f"WUDI, time {time:g}": lambda time=time: each_map(plan, flow(time)) for time in (0.0, 0.3, 1.0, 3.0, 10.0, 100.0)},
        **{f"NUFILT's filter, {share}": lambda share=share: merged_by(plan, "null_space", {"share": share}) for share in (0.3, 0.6, 0.9)},
        **{f"filter, mean inside, {share}": lambda share=share: each_map(plan, filtered(share, 0.2)) for share in (0.6, 0.9, 0.99)},
        **{f"filter by statistics, {share}": lambda share=share: each_map(plan, filtered_by_moments(share)) for share in (0.6, 0.9, 0.97)},
        **{f"soft filter, {floor}": lambda floor=floor: each_map(plan, soft_filter(floor)) for floor in (0.003, 0.01, 0.03, 0.1)},
        **{f"shares, {floor}": lambda floor=floor: each_map(plan, shares(floor, 0.0)) for floor in (0.001, 0.01, 0.05)},
        **{f"shares kept, {floor}": lambda floor=floor: each_map(plan, shares(floor, floor)) for floor in (0.003, 0.01, 0.03, 0.1)},
        "aligned by shares": lambda: each_map(plan, shares_of_moments),
        **{f"linear, scale {scale}": lambda scale=scale: merged_by(plan, "linear", {"scale": scale}) for scale in (1.5, 2.0, 3.0)},
        **{f"ties, scale {scale}": lambda scale=scale: merged_by(plan, "ties", {"scale": scale}) for scale in (0.7, 1.5)},
        **{f"tsv, scale {scale}": lambda scale=scale: merged_by(plan, "tsv", {"scale": scale}) for scale in (0.5, 0.7)},
        "aligned, moments uncut": lambda: uncut(plan, moments()),
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
    parser.add_argument("--only", default="", help="only candidates whose names have this in them (a regular expression)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    scenario = load_scenario(args.scenario, dict(pair.split("=", 1) for pair in args.set) | {"out": args.out})
    design = make_design(scenario)
    store, settings = store_of(scenario), scenario.settings(None, 0)
    tokenizer = load_tokenizer(design.base.folder)

    def held_out(source: RowSource, skip: int) -> list[EncodedRow]:
        return encode_rows(source.under(scenario.data).read()[skip : skip + HELD_OUT], tokenizer, **settings.encoding)

    tasks = {task.name: held_out(task.train, design.train_rows[task.name]) for task in scenario.tasks}
    unseen = {task.name: held_out(task.test, scenario.rows.test or 0) for task in scenario.unseen}

    def losses(tensors: Tensors, rows: dict[str, list[EncodedRow]]) -> dict[str, float]:
        model = build_model(design.base.folder, tensors)
        return {task: mean_loss(model, encoded) for task, encoded in rows.items()}

    results: dict[str, list[tuple[float, float]]] = {}
    for seed in args.seeds or scenario.seeds:
        plan, jobs = plan_of(design, store, seed)

        def moments(plan: Plan = plan, jobs: Sequence[StatisticsJob] = jobs) -> list[Tensors]:
            found = []
            for number, (job, stats) in enumerate(zip(jobs, plan.statistics, strict=True)):
                assert stats is not None
                typical = [job.model.rows[row] for row in stats.facts["rows"]]
                found.append(moments_of(plan, number, encode_rows(typical, tokenizer, **settings.encoding)))
            return found

        base = losses({name: widen(plan.base.read(name)) for name in plan.specs}, tasks | unseen)
        own: dict[str, float] = {}
        for expert in plan.experts:
            own |= losses(own_tensors(expert, plan.base, plan.merges), {expert.name: tasks[expert.name]})
        newest = {"path": str(store.keep_rows(jobs[-1].model.rows))}
        for name, merge in candidates(plan, newest, moments).items():
            if not re.search(args.only, name):
                continue
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
