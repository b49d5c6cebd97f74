"""Many tiny tensors: what a merge costs beside its bytes. Llamas of width 8 with 100, 400 and 1,600 blocks of 9 tensors."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from benchmarks.bars import Figure
from benchmarks.expected import check_mean
from benchmarks.inputs import TINY, llamas, peers_run
from benchmarks.measure import Bench, Run, Side, ratios, remove

BLOCKS = (100, 400, 1600)
PEER_UP_TO = 400  # blocks; its time grows with the square, to hours


def measure(bench: Bench) -> Iterator[Figure]:
    warm = peers_run(bench.work / "runs" / "warm.yaml", "linear", llamas(bench, "tiny", TINY, 2))
    found: dict[int, list[Run]] = {}
    for blocks in (2,) if bench.quick else BLOCKS:
        count = 9 * blocks + 3
        models = llamas(bench, f"tensors-{count}", TINY | {"num_hidden_layers": blocks}, 2)
        file = peers_run(bench.work / "runs" / f"tensors-{count}.yaml", "linear", models)
        out = {name: bench.work / "out" / name for name in ("checked", "unchecked", "peer")}
        given = {"run": str(file), "warm": str(warm)}
        job = {"do": "merge", **given}
        sides = {
            "checked": Side(lambda job=job, out=out: bench.inside("ours", job | {"out": str(out["checked"])}), out["checked"]),
            "unchecked": Side(
                lambda job=job, out=out: bench.inside("ours", job | {"out": str(out["unchecked"]), "sets": {"out.reload": False}}),
                out["unchecked"],
            ),
            "peer": Side(lambda given=given, out=out: bench.inside_peer(given | {"out": str(out["peer"])}), out["peer"])
            if bench.peer and blocks <= PEER_UP_TO
            else None,
        }
        runs = bench.in_turn(sides, 1 if blocks == PEER_UP_TO else None)
        found[count] = runs["checked"]
        check_mean(out["checked"], models)
        check_mean(out["unchecked"], models)
        for place in out.values():
            remove(place)
        case = f"{count:,} tensors"
        yield Figure("tensors.time", case, [run.seconds for run in runs["checked"]], note="the result loaded and run once")
        yield Figure("tensors.time", case, [run.seconds for run in runs["unchecked"]], note="`out.reload: false`")
        if "peer" in runs:
            behind = [[run.seconds for run in runs[name]] for name in ("checked", "peer")]
            yield Figure(None, case, ratios(runs["peer"], runs["checked"]), *behind, work="the same, against mergekit", unit="x as fast")
    if not bench.quick:
        middle, many = (9 * blocks + 3 for blocks in BLOCKS[1:])
        each = [median(run.seconds for run in found[count]) / count for count in (middle, many)]
        yield Figure("tensors.growth", f"{many:,} tensors", [each[1] / each[0]])
