"""`recall`: time beside plain forward passes and our linear, bytes read, memory. Five experts, 20 typical samples of 60 rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean

import torch

from benchmarks.bars import Figure
from benchmarks.expected import WrongError, check_tensor, read, recall_weights
from benchmarks.inputs import TINY, all_tensors, deeper, largest_block, llamas, recall_run, small_models, weight_files, write_rows
from benchmarks.measure import GB, Bench, Side, remove

EXPERTS, SAMPLES, ROWS, CHARACTERS = 5, 20, 60, 500
ALLOWANCE = 0.6e9  # bytes: interpreter, libraries, and what a block works with


def measure(bench: Bench) -> Iterator[Figure]:
    models = small_models(bench, EXPERTS + 1, "bfloat16")
    rows = write_rows(bench.work / "runs" / "rows.jsonl", 24 if bench.quick else ROWS, 60 if bench.quick else CHARACTERS)
    few = write_rows(bench.work / "runs" / "warm.jsonl", 4, 60)
    warm = llamas(bench, "tiny", TINY, 3)
    runs = bench.work / "runs"
    files = {
        "recall": recall_run(runs / "recall.yaml", models, rows, count=SAMPLES),
        "linear": recall_run(runs / "recall-linear.yaml", models, rows, method="linear"),
        "recall-warm": recall_run(runs / "recall-warm.yaml", warm, few, count=2),
        "linear-warm": recall_run(runs / "recall-linear-warm.yaml", warm, few, method="linear"),
    }
    out = {name: bench.work / "out" / name for name in ("recall", "linear", "whole", "deep")}

    def inside(name: str) -> Side:
        job = {"do": "merge", "run": str(files[name]), "warm": str(files[f"{name}-warm"]), "out": str(out[name])}
        return Side(lambda: bench.inside("ours", job), out[name])

    chosen: list[int] = []
    states = bench.work / "out" / "states.pt"

    def plain():
        record = json.loads((out["recall"] / "record.json").read_text())
        chosen[:] = [sample["row"] for sample in record["samples"]]
        job = {"experts": [str(model) for model in models[1:]], "rows": str(rows), "samples": chosen, "states": str(states)}
        return bench.inside("plain", job)

    done = bench.in_turn({"recall": inside("recall"), "linear": inside("linear"), "plain": Side(plain)})
    check_recall(out["recall"], models, torch.load(states))
    needed = [a.output["seconds"] + a.output["pool"] + b.seconds for a, b in zip(done["plain"], done["linear"], strict=True)]
    seconds = [run.seconds for run in done["recall"]]
    tokens = [done["plain"][0].output[key] for key in ("sample_tokens", "pool_tokens")]
    case = f"{EXPERTS} x SmolLM2-135M bfloat16, {SAMPLES} samples of {tokens[0] // SAMPLES} tokens out of {ROWS} rows"
    forward, pool = (mean(run.output[key] for run in done["plain"]) for key in ("seconds", "pool"))
    linear = mean(run.seconds for run in done["linear"])
    note = f"forward passes {forward:.2f} s, of the newest over all rows {pool:.2f} s, linear {linear:.2f} s"
    yield Figure("recall.time", case, [a / b for a, b in zip(seconds, needed, strict=True)], seconds, needed, note)
    for folder in (out["recall"], out["linear"]):
        remove(folder)
    yield from bytes_and_memory(bench, case, models, files["recall"], done["recall"][0].output["read"], tokens, rows)


def bytes_and_memory(
    bench: Bench, case: str, models: Sequence[Path], file: Path, read_: int, tokens: Sequence[int], rows: Path
) -> Iterator[Figure]:
    """Bytes and peak memory of whole processes, without and with a reload of the result."""
    sizes = [sum(weights.stat().st_size for weights in weight_files(model)) for model in models]
    experts = sum(sizes[1:]) + sizes[-1]
    note = f"{read_ / GB:.2f} GB read"
    yield Figure("recall.bytes", case, [read_ / (experts + sizes[0])], note=note)
    yield Figure("recall.bytes.experts", case, [read_ / experts], note=note + "; deltas are taken from the base, so it is read too")
    deep = recall_run(bench.work / "runs" / "recall-deep.yaml", deeper(models), rows, count=SAMPLES)
    out = bench.work / "out" / "memory"
    # hidden states in float32: of the pool, or of all experts' samples, whichever are more
    width = json.loads((models[0] / "config.json").read_text())["hidden_size"]
    allowed = EXPERTS * largest_block(models[0]) + 4 * width * max(tokens[1], EXPERTS * tokens[0]) + ALLOWANCE
    peaks = {}
    for name, run_file in (("as it is", file), ("twice", deep)):
        for reload in (False, True):
            remove(out)
            peaks[name, reload] = bench.recall("merge", run_file, "--out", out, "--quiet", "--set", f"out.reload={reload}").anonymous
    remove(out)
    note = f"{allowed / GB:.2f} GB allowed, of which {ALLOWANCE / GB:.1f} GB for libraries and work"
    for reload, more in ((False, ""), (True, "; `out.reload: true`")):
        one, two = peaks["as it is", reload], peaks["twice", reload]
        yield Figure("recall.memory", case + more, [one / allowed], [one / GB], [allowed / GB], note)
        yield Figure("recall.blocks", case + more, [two / one], [two / GB], [one / GB])


def check_recall(out: Path, models: Sequence[Path], states: torch.Tensor) -> None:
    """Check that the record's weights follow from plain transformers' hidden states, and every tensor is the experts' mean by them.

    Raises:
        WrongError: if not.
    """
    weights = torch.tensor(json.loads((out / "record.json").read_text())["weights"]["rows"], dtype=torch.float64)
    far = (weights - recall_weights(states)).abs().max()
    if far > 1e-3:
        raise WrongError(f"weights differ by {far:.2g} from those of plain forward passes")
    for name, tensor in all_tensors(out):
        layer = int(name.split(".")[2]) + 1 if name.startswith("model.layers.") else 0 if "embed" in name else len(weights) - 1
        check_tensor(name, tensor, [read(model, name) for model in models[1:]], weights[layer].tolist(), slack=4e-6)
