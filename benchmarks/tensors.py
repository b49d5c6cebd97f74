"""Many tiny tensors: the cost per tensor. Llamas of width 8 with 100, 400 and 1,600 blocks of 9 tensors."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from benchmarks.bars import Figure
from benchmarks.expected import check_mean
from benchmarks.inputs import TINY, llamas, peers_run
from benchmarks.measure import Bench, Run, Side, ratios, remove

BLOCKS = (100, 400, 1600)
PEER_UP_TO = 400  # blocks; mergekit's time grows with their square, to hours


def measure(bench: Bench) -> Iterator[Figure]:
    warm = peers_run(bench.work / "runs" / "warm.yaml", "linear", llamas(bench, "tiny", TINY, 2))
    by_count: dict[int, list[Run]] = {}
    for blocks in (2,) if bench.quick else BLOCKS:
        count = 9 * blocks + 3
        models = llamas(bench, f"tensors-{count}", TINY | {"num_hidden_layers": blocks}, 2)
        file = peers_run(bench.work / "runs" / f"tensors-{count}.yaml", "linear", models)
        out = {name: bench.work / "out" / name for name in ("ours", "reloaded", "peer")}
        jobs: dict[str, dict[str, Any]] = {
            name: {"do": "merge", "run": str(file), "warm": str(warm), "out": str(folder)} for name, folder in out.items()
        }
        jobs["reloaded"]["sets"] = {"out.reload": True}
        sides: dict[str, Side | None] = {
            name: Side(lambda job=jobs[name]: bench.inside("ours", job), out[name]) for name in ("ours", "reloaded")
        }
        if bench.peer and blocks <= PEER_UP_TO:
            sides["peer"] = Side(lambda job=jobs["peer"]: bench.inside_peer(job), out["peer"])
        runs = bench.in_turn(sides, 1 if blocks == PEER_UP_TO else None)
        by_count[count] = runs["ours"]
        for name in ("ours", "reloaded"):
            check_mean(out[name], models)
        for folder in out.values():
            remove(folder)
        case = f"{count:,} tensors"
        yield Figure("tensors.time", case, [run.seconds for run in runs["ours"]])
        yield Figure("tensors.time", case, [run.seconds for run in runs["reloaded"]], note="`out.reload: true`")
        if "peer" in runs:
            behind = [[run.seconds for run in runs[name]] for name in ("ours", "peer")]
            yield Figure(None, case, ratios(runs["peer"], runs["ours"]), *behind, work="the same, against mergekit", unit="x as fast")
    if not bench.quick:
        middle, many = (9 * blocks + 3 for blocks in BLOCKS[1:])
        each = [median(run.seconds for run in by_count[count]) / count for count in (middle, many)]
        yield Figure("tensors.growth", f"{many:,} tensors", [each[1] / each[0]])
