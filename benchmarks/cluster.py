"""Ray beside local on one machine: the same merge and the same bench, with one worker and with two, each with one thread.

The merge is `recall` on five copies of the small model, in shards; the bench trains two tasks in two orders. Whole processes are timed, so
the start of Ray and the imports of its workers count. All results must be the same to the byte.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.bars import Figure
from benchmarks.expected import WrongError
from benchmarks.inputs import recall_run, small_models, write_rows
from benchmarks.measure import Bench, Run, Side, ratios, remove

EXPERTS, SAMPLES, ROWS, CHARACTERS = 5, 20, 60, 500
WORDS = ("yes", "no")
JOBS = 12  # that the bench has, at least
MAY_DIFFER = ("seconds", "bytes", "peak_memory", "created")  # keys of a record


def measure(bench: Bench) -> Iterator[Figure]:
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default: other work would slow this side only
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:2])  # Ray starts as many workers
    try:
        yield from merges(bench)
        yield from benches(bench)
    finally:
        os.sched_setaffinity(0, before)


def merges(bench: Bench) -> Iterator[Figure]:
    models = small_models(bench, EXPERTS + 1, "bfloat16")
    rows = write_rows(bench.work / "runs" / "rows.jsonl", 24 if bench.quick else ROWS, 60 if bench.quick else CHARACTERS)
    file = recall_run(bench.work / "runs" / "cluster.yaml", models, rows, count=SAMPLES)
    size = "20KB" if bench.quick else "30MB"
    out = {name: bench.work / "out" / f"merge-{name}" for name in ("local", "one", "two")}

    def side(name: str, executor: str, threads: int | None) -> Side:
        words = ["merge", file, "--out", out[name], "--set", f"out.shard_size={size}", "--executor", executor, "--quiet"]
        return Side(lambda: bench.recall(*words, *(["--set", f"threads={threads}"] if threads else [])), out[name])

    runs = bench.in_turn({"local": side("local", "local", 1), "one": side("one", "ray", 1), "two": side("two", "ray", None)})
    shards = len([*out["local"].glob("*.safetensors")])
    for name in ("one", "two"):
        check_same(result(out["local"]), result(out[name]), f"the merge with worker(s): {name}")
    yield from figures(runs, "merge", f"recall, {EXPERTS} x SmolLM2-135M bfloat16, {shards} shards")
    for folder in out.values():
        remove(folder)


def benches(bench: Bench) -> Iterator[Figure]:
    model = scorable_model(bench)
    data = bench.work / "runs" / "cluster-data"
    data.mkdir(parents=True, exist_ok=True)
    names = ("colour", "weather")
    for name in names:
        for part, count in (("train", 8), ("test", 8)):
            (data / f"{name}-{part}.jsonl").write_text("".join(json.dumps(question(name, number)) + "\n" for number in range(count)))
    scenario: dict[str, Any] = {
        "model": str(model),
        "data": str(data),
        "tasks": [{"name": name, "train": f"{name}-train.jsonl", "test": f"{name}-test.jsonl"} for name in names],
        "orders": {"count": 2},
        "methods": ["experts", {"method": "linear", "name": "uniform"}, "recall", "sequential"],
        "training": {"rank": 4, "alpha": 8, "epochs": 1, "batch_size": 4},
        "samples": {"count": 3},
    }
    file = bench.work / "runs" / "cluster-bench.yaml"
    file.write_text(yaml.safe_dump(scenario))
    out = {name: bench.work / "out" / f"bench-{name}" for name in ("local", "one", "two")}
    jobs = planned(bench, file, out["local"])
    if jobs < JOBS:
        raise WrongError(f"the bench has {jobs} jobs")

    def side(name: str, executor: str, workers: int) -> Side:
        words = ["bench", file, "--out", out[name], "--set", f"workers={workers}", "--executor", executor, "--quiet"]
        return Side(lambda: bench.recall(*words), out[name])

    sides = {"local": side("local", "local", 1), "one": side("one", "ray", 1), "two": side("two", "ray", 2)}
    runs = bench.in_turn(sides, min(bench.rounds, 3))
    for name in ("one", "two"):
        check_same(outputs(out["local"]), outputs(out[name]), f"the bench with worker(s): {name}")
    yield from figures(runs, "bench", f"{jobs} jobs, SmolLM2-135M")
    for folder in out.values():
        remove(folder)


def figures(runs: dict[str, list[Run]], kind: str, case: str) -> Iterator[Figure]:
    """Ray's overhead as a ratio and in seconds, and the efficiency of two workers."""
    local, one, two = ([run.seconds for run in runs[name]] for name in ("local", "one", "two"))
    note = "whole processes, one thread a worker"
    ratio, more = ratios(runs["one"], runs["local"]), [a - b for a, b in zip(one, local, strict=True)]
    share = [a / b / 2 for a, b in zip(one, two, strict=True)]
    yield Figure(None, case, ratio, one, local, note, f"{kind}, Ray with one worker, against local", "x the time")
    yield Figure(None, case, more, note=note, work=f"{kind}, Ray with one worker, more than local", unit="s")
    yield Figure(None, case, share, one, two, note, f"{kind}, Ray, parallel efficiency of two workers", "of the ideal")


def question(name: str, number: int) -> dict[str, Any]:
    answer = WORDS[number * (3 if name == "colour" else 5) % 4 < 2]
    return {"prompt": f"{name} number {number}: yes or no?", "completion": f" {answer}", "choices": [f" {word}" for word in WORDS]}


def scorable_model(bench: Bench) -> Path:
    """The small model; the quick one's tokenizer gets an end token, without which nothing can be scored."""
    (model,) = small_models(bench, 1, "bfloat16")
    if not bench.quick:
        return model
    from transformers import AutoTokenizer

    ended = bench.work / "quick-ended"
    shutil.copytree(model, ended, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(ended)
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.save_pretrained(ended)
    return ended


def planned(bench: Bench, file: Path, out: Path) -> int:
    return bench.recall("bench", file, "--out", out, "--plan", "--json").output["jobs"]


def result(folder: Path) -> dict[str, Any]:
    """The files of a result, and its record without times and the folder's name."""
    files: dict[str, Any] = {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "README.md"}
    record = json.loads(files["record.json"])
    record = {key: value for key, value in record.items() if key not in MAY_DIFFER}
    record["files"].pop("README.md", None)  # it names the folder, as the run does
    del record["run"]["out"]["path"]
    return files | {"record.json": record}


def outputs(folder: Path) -> dict[str, bytes]:
    """The weights and tables of a bench."""
    files = [file for file in folder.rglob("*") if file.suffix in (".safetensors", ".csv") or file.name == "R.json"]
    return {str(file.relative_to(folder)): without_seconds(file) if file.suffix == ".csv" else file.read_bytes() for file in files}


def without_seconds(table: Path) -> bytes:
    with table.open(encoding="utf-8", newline="") as file:
        return repr([{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]).encode()


def check_same(local: dict[str, Any], ray: dict[str, Any], what: str) -> None:
    """Raises: WrongError: with the names of what differs, or if there is nothing to compare."""
    differ: Sequence[str] = [name for name in sorted({*local, *ray}) if local.get(name) != ray.get(name)]
    if differ or len(local) < 3:
        raise WrongError(f"{what} differs from local: {', '.join(differ[:5]) or 'there are too few files to compare'}")
