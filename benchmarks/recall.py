"""`recall`, one pass: bytes read, memory, time beside plain forward passes and our linear. Five experts, 20 typical samples of 60 rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

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

    found = bench.in_turn({"recall": inside("recall"), "linear": inside("linear"), "plain": Side(plain)})
    check_recall(out["recall"], models, torch.load(states))
    needed = [a.told["seconds"] + a.told["pool"] + b.seconds for a, b in zip(found["plain"], found["linear"], strict=True)]
    seconds = [one.seconds for one in found["recall"]]
    tokens = [found["plain"][0].told[key] for key in ("sample_tokens", "pool_tokens")]
    case = f"{EXPERTS} x SmolLM2-135M bfloat16, {SAMPLES} samples of {tokens[0] // SAMPLES} tokens out of {ROWS} rows"
    parts = [sum(one.told["seconds"] for one in found["plain"]), sum(one.told["pool"] for one in found["plain"])]
    parts = [*parts, sum(one.seconds for one in found["linear"])]
    note = "forward passes {:.2f} s, of the newest over all rows {:.2f} s, linear {:.2f} s".format(*(part / len(seconds) for part in parts))
    yield Figure("recall.time", case, [a / b for a, b in zip(seconds, needed, strict=True)], seconds, needed, note)
    for place in (out["recall"], out["linear"]):
        remove(place)
    yield from bytes_and_memory(bench, case, models, files["recall"], found["recall"][0].told["read"], tokens, rows)


def bytes_and_memory(
    bench: Bench, case: str, models: Sequence[Path], file: Path, read_: int, tokens: Sequence[int], rows: Path
) -> Iterator[Figure]:
    """From whole processes, without the check that loads the result: that is another model's worth, of the result."""
    sizes = [sum(weights.stat().st_size for weights in weight_files(model)) for model in models]
    experts = sum(sizes[1:]) + sizes[-1]
    note = f"{read_ / GB:.2f} GB read"
    yield Figure("recall.bytes", case, [read_ / (experts + sizes[0])], note=note)
    yield Figure("recall.bytes.experts", case, [read_ / experts], note=note + "; deltas are taken from the base, which is hashed too")
    deep = recall_run(bench.work / "runs" / "recall-deep.yaml", deeper(bench, models), rows, count=SAMPLES)
    out = bench.work / "out" / "memory"
    # hidden states in float32: of the pool, or of all experts' samples, whichever are more
    width = json.loads((models[0] / "config.json").read_text())["hidden_size"]
    allowed = EXPERTS * largest_block(models[0]) + 4 * width * max(tokens[1], EXPERTS * tokens[0]) + ALLOWANCE
    peaks = {}
    for name, run_file in (("as it is", file), ("twice", deep)):
        for checked in (False, True):
            remove(out)
            peaks[name, checked] = bench.recall("merge", run_file, "--out", out, "--quiet", "--set", f"out.reload={checked}").anonymous
    remove(out)
    told = f"{allowed / GB:.2f} GB allowed, of which {ALLOWANCE / GB:.1f} GB for libraries and work"
    for checked, words in ((True, "all checks"), (False, "`out.reload: false`")):
        one, two = peaks["as it is", checked], peaks["twice", checked]
        yield Figure("recall.memory", f"{case}; {words}", [one / allowed], [one / GB], [allowed / GB], told)
        yield Figure("recall.layer", f"{case}; {words}", [two / one], [two / GB], [one / GB])


def check_recall(out: Path, models: Sequence[Path], states: torch.Tensor) -> None:
    """Weights from plain transformers' hidden states are those of the record, and every tensor is the experts' mean by them.

    Raises:
        WrongError: if not.
    """
    told = torch.tensor(json.loads((out / "record.json").read_text())["weights"]["rows"], dtype=torch.float64)
    far = (told - recall_weights(states)).abs().max()
    if far > 1e-3:
        raise WrongError(f"weights are {far:.2g} from those of plain forward passes")
    for name, tensor in all_tensors(out):
        layer = int(name.split(".")[2]) + 1 if name.startswith("model.layers.") else 0 if "embed" in name else len(told) - 1
        check_tensor(name, tensor, [read(model, name) for model in models[1:]], told[layer].tolist(), slack=4e-6)
