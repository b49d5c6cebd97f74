"""`linear`: time and memory beside mergekit, as a whole process and after imports, and beside `cat` and `cp` of the same files."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from benchmarks.bars import Figure
from benchmarks.expected import WrongError, check_mean, difference
from benchmarks.inputs import L1B, QUICK, TINY, llamas, peers_run, small_models, weight_files
from benchmarks.measure import GB, Bench, Run, Side, ratios, remove, run


def measure(bench: Bench) -> Iterator[Figure]:
    warm = peers_run(bench.work / "runs" / "warm.yaml", "linear", llamas(bench, "tiny", TINY, 2))
    for dtype in ("float32", "bfloat16"):
        yield from one_case(bench, f"4 x SmolLM2-135M {dtype}", dtype, small_models(bench, 4, dtype), warm)
    models = llamas(bench, "1b", QUICK if bench.quick else L1B, 2, shards=3)
    yield from one_case(bench, "2 x 1.1B bfloat16, 3 shards", "bfloat16", models, warm)


def one_case(bench: Bench, case: str, dtype: str, models: Sequence[Path], warm: Path) -> Iterator[Figure]:
    """All figures of one set of models, from the same rounds."""
    file = peers_run(bench.work / "runs" / f"linear-{models[0].name}.yaml", "linear", models)
    out = {name: bench.work / "out" / name for name in ("whole", "peer", "inside", "peer-inside", "pass", "limit")}
    job = {"run": str(file), "warm": str(warm)}
    sides = {
        "whole": Side(lambda: bench.recall("merge", file, "--out", out["whole"], "--quiet"), out["whole"]),
        "peer": bench.peer and Side(partial(run, [bench.peer.with_name("mergekit-yaml"), file, out["peer"]]), out["peer"]),
        "inside": Side(lambda: bench.inside("ours", {"do": "merge", "out": str(out["inside"]), **job}), out["inside"]),
        "peer-inside": bench.peer and Side(lambda: bench.inside_peer({"out": str(out["peer-inside"]), **job}), out["peer-inside"]),
        "pass": Side(lambda: bench.inside("ours", {"do": "pass", "out": str(out["pass"]), **job}), out["pass"]),
        "limit": Side(lambda: read_and_copy(models, out["limit"]), out["limit"]),
    }
    runs = bench.in_turn(sides)
    for name in ("whole", "inside", "pass"):
        check_mean(out[name], models)
    if bench.peer:
        names = ["model.norm.weight", "model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"]
        if (share := difference(out["whole"], out["peer"], names)) > 0.001:
            raise WrongError(f"mergekit's result differs from ours in {share:.2%} of the numbers")
    for folder in out.values():
        remove(folder)

    def against(bar: str, name: str, other: str, *, faster: bool, note: str = "") -> Figure:
        values = ratios(runs[other], runs[name]) if faster else ratios(runs[name], runs[other])
        return Figure(bar, case, values, _seconds(runs[name]), _seconds(runs[other]), note)

    if bench.peer:
        yield against(f"linear.{dtype}.whole", "whole", "peer", faster=True)
        if dtype == "float32":
            ours, theirs = ([run.processor for run in runs[name]] for name in ("whole", "peer"))
            yield Figure("linear.float32.processor", case, [b / a for a, b in zip(ours, theirs, strict=True)], ours, theirs)
        yield against(f"linear.{dtype}.inside", "inside", "peer-inside", faster=True)
    memory = [[run.anonymous / GB for run in runs[name]] for name in ("whole", "peer") if name in runs]
    yield Figure(f"linear.{dtype}.memory", case, [max(memory[0])], *memory)
    yield against("linear.pass", "pass", "limit", faster=False)
    yield against("linear.checked", "inside", "limit", faster=False, note="waits for the disk at the end, `cp` does not")


def read_and_copy(models: Sequence[Path], out: Path) -> Run:
    """The limit: the system's own tools read all inputs and write as many bytes as the result has."""
    files = [shlex.quote(str(file)) for model in models for file in weight_files(model)]
    one = " ".join(shlex.quote(str(file)) for file in weight_files(models[0]))
    out.mkdir(parents=True)
    return run(["sh", "-c", f"cat {' '.join(files)} > /dev/null && cp --reflink=never {one} {shlex.quote(str(out))}"])


def _seconds(runs: Sequence[Run]) -> list[float]:
    return [run.seconds for run in runs]
