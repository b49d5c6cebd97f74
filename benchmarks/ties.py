"""`ties` of density 0.2 on three 1.1B-shaped models, base and two experts, beside our linear and beside mergekit, which takes minutes."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.bars import Figure
from benchmarks.expected import check_ties, difference
from benchmarks.inputs import L1B, QUICK, TINY, llamas, peers_run
from benchmarks.measure import Bench, Side, ratios, remove

DENSITY = 0.2


def measure(bench: Bench) -> Iterator[Figure]:
    shape = QUICK if bench.quick else L1B
    models, tiny = llamas(bench, "1b", shape, 3, shards=3), llamas(bench, "tiny", TINY, 3)
    case = "3 x 1.1B bfloat16 (base and 2 experts)"

    def run_file(name: str, method: str, folders: list, **each: float):
        return peers_run(bench.work / "runs" / f"{name}.yaml", method, folders[1:], base=folders[0], **each)

    # linear over the same files: base and both experts are read
    files = {
        "ties": (run_file("ties", "ties", models, density=DENSITY), run_file("ties-warm", "ties", tiny, density=DENSITY)),
        "linear": (run_file("arithmetic", "task_arithmetic", models), run_file("arithmetic-warm", "task_arithmetic", tiny)),
    }
    out = {name: bench.work / "out" / name for name in ("ties", "linear", "peer")}
    jobs = {name: {"do": "merge", "run": str(file), "warm": str(warm), "out": str(out[name])} for name, (file, warm) in files.items()}
    runs = bench.in_turn({name: Side(lambda name=name: bench.inside("ours", jobs[name]), out[name]) for name in files})
    names = [f"model.layers.{shape['num_hidden_layers'] // 2}.{part}.weight" for part in ("input_layernorm", "self_attn.q_proj")]
    names += ["model.layers.0.mlp.down_proj.weight", "model.norm.weight"]
    check_ties(out["ties"], models[0], models[1:], names, DENSITY)
    seconds = {name: [run.seconds for run in done] for name, done in runs.items()}
    yield Figure("ties.linear", case, ratios(runs["ties"], runs["linear"]), seconds["ties"], seconds["linear"])
    if bench.slow_peer:
        remove(out["peer"])
        theirs = bench.inside_peer({**jobs["ties"], "out": str(out["peer"])})
        share = difference(out["ties"], out["peer"], names)
        note = f"one run of mergekit; {share:.2%} of the numbers differ: of entries that tie at the threshold it keeps some, we keep all"
        yield Figure("ties.peer", case, [theirs.seconds / one for one in seconds["ties"]], seconds["ties"], [theirs.seconds], note)
    for folder in out.values():
        remove(folder)
