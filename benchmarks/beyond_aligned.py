"""What could be better than `aligned`, and is it? python benchmarks/beyond_aligned.py SCENARIO --set data=.. --set model=.. --out FOLDER

Experts and statistics are those of a bench that has been run with `aligned` among its methods (SCENARIO, FOLDER). For every seed each way merges
its experts, and each merge is asked rows that nobody was trained on. What is printed, over seeds:

    kept    mean over tasks of (L_base - L) / (L_base - L_expert), L the mean loss of the completions: the share of the experts' gain
    unseen  mean over tasks that nobody learnt of L - L_base, in nats: below 0 is better than the base

`block by block` and `uncut` read the experts' typical rows themselves, which no merge from statistics can: they say what there would be to gain.
It knows Llama's modules only, as the small model is one. About six minutes a seed on one thread.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recall_merge.bench.bench import store_of
from recall_merge.bench.design import Design, make_design
from recall_merge.bench.jobs import Merged, StatisticsJob, Store, full_run
from recall_merge.bench.scenario import load_scenario
from recall_merge.files.experts import Digest, own_tensors, widen
from recall_merge.files.rows import read_rows
from recall_merge.maths.deltas import LowRank
from recall_merge.maths.methods.informed import aligned
from recall_merge.maths.methods.spectral import tsv
from recall_merge.maths.moments import Moment
from recall_merge.merging.plan import Plan, make_plan
from recall_merge.merging.tensors import merge_tensors
from recall_merge.merging.weights import compute_weights
from recall_merge.models.load import build_model, load_tokenizer
from recall_merge.models.losses import mean_loss
from recall_merge.models.tokens import EncodedRow, encode_rows

ASKED = 16  # rows of each task
KEEP, RIDGE = 0.9, 1e-6  # aligned's own defaults
PULL = 0.1  # ridge of the correction block by block, against a mean diagonal of 1
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)

Tensors = dict[str, Tensor]


def merged_by(plan: Plan, method: str, options: dict[str, Any] | None = None, **more: Any) -> Tensors:
    """What `recall merge` would write, by another method or with other settings."""
    told = plan.run.model_dump(mode="json", exclude_defaults=True) | {"method": method, "options": options or {}} | more
    again = make_plan(type(plan.run).model_validate(told), writes=False)
    return dict(merge_tensors(again, compute_weights(again), Digest()))


def each_map(plan: Plan, merge: Callable[[Tensor, list[Any], list[Moment]], Tensor]) -> Tensors:
    """The merge by statistics with another solution for every linear map that all statistics tell of."""
    tensors = merged_by(plan, "aligned")
    for name in tensors:
        known = [found[0] for stats in plan.statistics if stats and (found := stats.moment(name))]
        if len(known) == len(plan.experts):
            base = widen(plan.base.read(name))
            deltas = [expert.delta(name, base) for expert in plan.experts]
            if all(isinstance(delta, LowRank) for delta in deltas):
                tensors[name] = merge(base, deltas, known)
    return tensors


def tsv_of_parts(base: Tensor, deltas: list[LowRank], moments: list[Moment]) -> Tensor:
    """aligned is a sum of parts, delta_q G_q (sum_p G_p + ridge I)^-1 (equal weights): orthogonalise the parts before they are added."""
    shrunk = [moment.shrunk(KEEP).dense() / len(moments) for moment in moments]
    whole = sum(shrunk, RIDGE * torch.eye(base.shape[1], dtype=torch.float64))
    downs = [torch.linalg.solve(whole, (delta.down.double() @ own).mT).mT for delta, own in zip(deltas, shrunk, strict=True)]
    parts = [LowRank(delta.up, down.float()) for delta, down in zip(deltas, downs, strict=True)]
    return tsv(base, parts, [1 / len(parts)] * len(parts))


def parts_that_add_up(quiet: float) -> Callable[[Tensor, list[LowRank], list[Moment]], Tensor]:
    """sum_q delta_q G_q (G_q + quiet sum_{p != q} G_p + k ridge I)^-1: each part answers its own expert's inputs and is quiet on those of
    the others, which counts less than in aligned (quiet = 1). Where several experts read the same, parts add up to more than their mean."""

    def merge(base: Tensor, deltas: list[LowRank], moments: list[Moment]) -> Tensor:
        shrunk = [moment.shrunk(KEEP).dense() for moment in moments]
        whole = quiet * sum(shrunk, torch.zeros_like(shrunk[0])) + len(moments) * RIDGE * torch.eye(base.shape[1], dtype=torch.float64)
        merged = base.double()
        for delta, own in zip(deltas, shrunk, strict=True):
            down = torch.linalg.solve(whole + (1 - quiet) * own, (delta.down.double() @ own).mT).mT
            merged = merged + delta.up.double() @ down
        return merged.float()

    return merge


def from_deltas(floor: float) -> Callable[[Tensor, list[LowRank], list[Moment]], Tensor]:
    """aligned without statistics: training moves a map along the inputs that it reads, so delta^T delta stands for E[x x^T].

    `floor` is added to its diagonal, as a share of its mean.
    """

    def merge(base: Tensor, deltas: list[LowRank], _: list[Moment]) -> Tensor:
        moments = []
        for delta in deltas:
            values, vectors = torch.linalg.eigh(delta.up.double().mT @ delta.up.double())
            factor = delta.down.double().mT @ (vectors * values.clamp(min=0).sqrt())  # (i, r), factor factor^T = delta^T delta
            moments.append(Moment(factor, torch.full((base.shape[1],), floor * float(factor.square().sum()) / base.shape[1])))
        return aligned(base, deltas, [1 / len(deltas)] * len(deltas), moments=moments, offdiagonal=1.0)

    return merge


@contextmanager
def reading(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What every linear map of the blocks read in the last pass, by the name of its tensor.    (tokens, i)"""
    read: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda _, args: read.__setitem__(name, args[0][0])

    maps = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name]
    handles = [module.register_forward_pre_hook(hook(f"{name}.weight")) for name, module in maps]
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def inputs_of(plan: Plan, number: int, rows: Sequence[EncodedRow]) -> Tensors:
    """What each map of one expert reads on its own typical rows.    (tokens, i) by the name of the tensor"""
    model = build_model(plan.base.folder, own_tensors(plan.experts[number], plan.base, plan.merges))
    passes: list[Tensors] = []
    with reading(model) as read:
        for row in rows:
            model(input_ids=torch.tensor([row.input_ids]), use_cache=False)
            passes.append(dict(read))
    return {name: torch.cat([one[name] for one in passes]) for name in passes[0]}


def moment_of(x: Tensor) -> Tensor:
    """E[x x^T] with a mean diagonal of 1, off-diagonal entries times KEEP.    (tokens, i) -> (i, i) float64"""
    moment = (x.double().mT @ x.double()) / len(x)
    moment = moment / moment.diagonal().mean().clamp(min=1e-30)
    return KEEP * moment + (1 - KEEP) * torch.diag(moment.diagonal())


def uncut(plan: Plan, inputs: Sequence[Tensors]) -> Tensors:
    """aligned from whole moments, which are as large as the layers."""
    tensors = merged_by(plan, "aligned")
    for name in inputs[0]:
        base = widen(plan.base.read(name))
        moments = [moment_of(read[name]) / len(inputs) for read in inputs]
        seen = torch.zeros(base.shape, dtype=torch.float64)
        for expert, moment in zip(plan.experts, moments, strict=True):
            delta = expert.delta(name, base)
            assert isinstance(delta, LowRank)
            seen += delta.up.double() @ (delta.down.double() @ moment)
        whole = sum(moments, RIDGE * torch.eye(base.shape[1], dtype=torch.float64))
        tensors[name] = base + torch.linalg.solve(whole, seen.mT).mT.float()
    return tensors


@torch.no_grad()
def block_by_block(plan: Plan, inputs: Sequence[Tensors], rows: Sequence[Sequence[EncodedRow]]) -> Tensors:
    """aligned, then corrected map by map in the order of the pass: the merged model's own inputs shall give what the expert's gave.

    W <- W + sum_q E_q[(W_q x_q - W x) x^T] (sum_q E_q[x x^T] + PULL I)^-1, x what the model merged so far reads where expert q reads x_q.
    """
    tensors = merged_by(plan, "aligned")
    model = build_model(plan.base.folder, tensors)
    states = [[model.model.embed_tokens(torch.tensor([row.input_ids])) for row in own] for own in rows]
    places = [[model.model.rotary_emb(h, torch.arange(h.shape[1]).unsqueeze(0)) for h in own] for own in states]
    for layer, block in enumerate(model.model.layers):
        for group in GROUPS:
            read = [_read(block, group[0], own, at) for own, at in zip(states, places, strict=True)]
            scales = [float(x.square().mean()) for x in read]
            whole = sum(((x.double().mT @ x.double()) / (len(x) * s * len(read)) for x, s in zip(read, scales, strict=True)), 0.0)
            whole = whole + PULL * torch.eye(read[0].shape[1], dtype=torch.float64)
            for module in group:
                name = f"model.layers.{layer}.{module}.weight"
                weight = block.get_submodule(module).weight
                change = torch.zeros(weight.shape, dtype=torch.float64)
                for expert, x, s, theirs in zip(plan.experts, read, scales, inputs, strict=True):
                    own = expert.own(name, widen(plan.base.read(name)))
                    missing = theirs[name] @ own.mT - x @ weight.mT
                    change += (missing.double().mT @ x.double()) / (len(x) * s * len(read))
                weight.add_(torch.linalg.solve(whole, change.mT).mT.float())
                tensors[name] = weight.clone()
        for own, at in zip(states, places, strict=True):
            for number, h in enumerate(own):
                out = block(h, position_embeddings=at[number])
                own[number] = out[0] if isinstance(out, tuple) else out
    return tensors


def _read(block: nn.Module, module: str, states: Sequence[Tensor], places: Sequence[Any]) -> Tensor:
    """What one map of a block reads.    -> (tokens, i)"""
    found: list[Tensor] = []
    handle = block.get_submodule(module).register_forward_pre_hook(lambda _, args: found.append(args[0][0]))
    for h, at in zip(states, places, strict=True):
        block(h, position_embeddings=at)
    handle.remove()
    return torch.cat(found)


def plan_of(design: Design, store: Store, seed: int) -> tuple[Plan, list[StatisticsJob]]:
    """The plan of the scenario's `aligned` for one seed, and the statistics."""
    for trial in design.trials:
        model = trial.jobs[-1].model
        if trial.seed == seed and isinstance(model, Merged) and model.run["method"] == "aligned":
            folders = {name: store.where(one) for name, one in model.experts}
            statistics = {name: store.place(stats) for name, stats in model.statistics}
            return make_plan(full_run(model, folders, design.base.folder, None, statistics), writes=False), [
                stats for _, stats in model.statistics
            ]
    raise SystemExit("the scenario has no `aligned` in the scenario multi-model")


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

    def asked(file: str, skip: int) -> list[EncodedRow]:
        return encode_rows(read_rows(scenario.data / file)[skip : skip + ASKED], tokenizer, **settings.encoding)

    tasks = {task.name: asked(task.train, design.train_rows[task.name]) for task in scenario.tasks}
    others = {task.name: asked(task.test, scenario.rows.test or 0) for task in scenario.unseen}

    def losses(tensors: Tensors, rows: dict[str, list[EncodedRow]]) -> dict[str, float]:
        model = build_model(design.base.folder, tensors)
        return {task: mean_loss(model, some) for task, some in rows.items()}

    found: dict[str, list[tuple[float, float]]] = {}
    for seed in args.seeds or scenario.seeds:
        plan, statistics = plan_of(design, store, seed)
        trained = {stats.model.key: stats.model.rows for stats in statistics}
        rows = [
            encode_rows([trained[made.model.key][row] for row in stats.facts["rows"]], tokenizer, **settings.encoding)
            for made, stats in zip(statistics, plan.statistics, strict=True)
            if stats is not None
        ]
        base = losses({name: widen(plan.base.read(name)) for name in plan.specs}, tasks | others)
        own = {
            expert.name: losses(own_tensors(expert, plan.base, plan.merges), {expert.name: tasks[expert.name]})[expert.name]
            for expert in plan.experts
        }
        inputs = [inputs_of(plan, number, some) for number, some in enumerate(rows)]
        newest = {"path": str(store.keep_rows(statistics[-1].model.rows))}
        ways: dict[str, Callable[[], Tensors]] = {
            "uniform": lambda plan=plan: merged_by(plan, "linear"),
            "ties": lambda plan=plan: merged_by(plan, "ties"),
            "tsv": lambda plan=plan: merged_by(plan, "tsv"),
            "regmean": lambda plan=plan: merged_by(plan, "regmean"),
            "aligned": lambda plan=plan: merged_by(plan, "aligned"),
            "aligned, ridge 1e-3": lambda plan=plan: merged_by(plan, "aligned", {"ridge": 1e-3}),
            "aligned, scale 1.2": lambda plan=plan: merged_by(plan, "aligned", {"scale": 1.2}),
            "aligned, parts add up": lambda plan=plan: each_map(plan, parts_that_add_up(0.5)),
            "aligned, RECALL's weights": lambda plan=plan, newest=newest: merged_by(
                plan, "aligned", weights={"temperature": 1.0}, samples=newest
            ),
            "aligned, deeper is more": lambda plan=plan: merged_by(plan, "aligned", scale_by_layer={"alpha": 0.8, "beta": 0.4}),
            "aligned, deeper is less": lambda plan=plan: merged_by(plan, "aligned", scale_by_layer={"alpha": 1.2, "beta": -0.4}),
            "aligned, TSV of the parts": lambda plan=plan: each_map(plan, tsv_of_parts),
            "aligned, no statistics, floor .01": lambda plan=plan: each_map(plan, from_deltas(0.01)),
            "aligned, no statistics, floor .1": lambda plan=plan: each_map(plan, from_deltas(0.1)),
            "aligned, no statistics, floor 1": lambda plan=plan: each_map(plan, from_deltas(1.0)),
            "aligned, moments uncut": lambda plan=plan, inputs=inputs: uncut(plan, inputs),
            "aligned, block by block": lambda plan=plan, inputs=inputs, rows=rows: block_by_block(plan, inputs, rows),
        }
        for way, merge in ways.items():
            got = losses(merge(), tasks | others)
            kept = statistics.mean((base[task] - got[task]) / (base[task] - own[task]) for task in tasks)
            unseen = statistics.mean(got[task] - base[task] for task in others)
            found.setdefault(way, []).append((kept, unseen))
            print(f"seed {seed}  {way:28} kept {kept:.3f}  unseen {unseen:+.3f}", flush=True)
    print(f"\n| way | kept | unseen |\n| --- | --- | --- |  ({len(next(iter(found.values())))} seeds, {ASKED} rows a task)")
    for way, pairs in found.items():
        means = [statistics.mean(column) for column in zip(*pairs, strict=True)]
        spread = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in zip(*pairs, strict=True)]
        print(f"| {way} | {means[0]:.3f} ± {spread[0]:.3f} | {means[1]:+.3f} ± {spread[1]:.3f} |")
    Path(args.out, "beyond_aligned.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
