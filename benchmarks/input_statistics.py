"""Input statistics: time and memory of `recall stats`, how far they are from dense float64 moments, and a merge by them.

An adapter on SmolLM2-135M on one thread, then the first four blocks of an 8B-shaped Llama. Nothing that the pass holds grows with the
number of blocks, so four blocks have the memory of 32, and a block takes as long as any other.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.bars import Figure
from benchmarks.expected import WrongError
from benchmarks.inputs import L8B, QUICK, TINY, adapters, llamas, recall_run, small_models, write_rows
from benchmarks.measure import GB, Bench, Run, Side, remove

EXPERTS, SAMPLES, ROWS, CHARACTERS, BLOCKS = 5, 20, 100, 240, 4
METHODS = {"aligned": "aligned", "uniform": "linear"}
TIMES = {"samples": "choose_samples", "inputs": "_find_inputs"}  # what is timed, by the name of its function


def measure(bench: Bench) -> Iterator[Figure]:
    base = small_models(bench, 1, "bfloat16")[0]
    experts = adapters(bench, base, EXPERTS)
    rows = write_rows(bench.work / "runs" / "statistics.jsonl", 24 if bench.quick else ROWS, 60 if bench.quick else CHARACTERS)
    more = write_rows(bench.work / "runs" / "statistics-more.jsonl", 60 if bench.quick else 2 * SAMPLES * 10, CHARACTERS)
    out = bench.work / "out" / "statistics"
    case = f"LoRA on SmolLM2-135M, {SAMPLES} typical samples out of {ROWS} rows, one thread"

    def command(rows: Path, count: int) -> Run:
        words = ["--base", base, "-e", f"expert={experts[0]}", "-s", rows, "--out", out, "--json", "--quiet"]
        sets = (f"samples.count={count}", "samples.template=false", "threads=1")
        return bench.recall("stats", *words, *(word for each in sets for word in ("--set", each)))

    def parts() -> Run:
        entry = {"name": "expert", "path": str(experts[0])}
        samples = {"path": str(rows), "count": SAMPLES, "template": False}
        run = {"base": str(base), "experts": [entry], "samples": samples, "threads": 1}
        return bench.inside("input_statistics", {"run": run, "out": str(out)})

    done = bench.in_turn({"whole": Side(lambda: command(rows, SAMPLES), out), "parts": Side(parts, out)})
    processor = sorted(run.processor for run in done["whole"])[len(done["whole"]) // 2]
    note = f"{done['whole'][0].output['tokens']} tokens; {processor:.1f} processor s"
    yield Figure("stats.time", case, [run.wall for run in done["whole"]], note=note)
    yield Figure("stats.memory", case, [run.anonymous / GB for run in done["whole"]])
    note = ", ".join(f"{part} {done['parts'][0].output[part]:.1f} s" for part in ("samples", "inputs"))
    yield Figure("stats.directions", case, [run.output["directions"] for run in done["parts"]], note=note)
    middle, worst = errors(out, base, experts[0], rows)
    yield Figure("stats.error", case, [worst], note=f"median {middle:.1e}; stored in bfloat16, which rounds by up to 2e-3")

    remove(out)
    few, many = command(more, SAMPLES), command(more, 10 * SAMPLES)
    note = f"{few.output['tokens']:,} and {many.output['tokens']:,} tokens"
    case = f"{SAMPLES} and {10 * SAMPLES} samples out of {20 * SAMPLES} rows"
    yield Figure("stats.growth", case, [many.anonymous / few.anonymous], [many.anonymous / GB], [few.anonymous / GB], note)
    remove(out)
    yield from merge_by_them(bench, base, experts, rows)
    yield from large(bench)


def merge_by_them(bench: Bench, base: Path, experts: Sequence[Path], rows: Path) -> Iterator[Figure]:
    """A merge of all experts by their statistics."""
    for expert in experts:
        if not (expert / "stats.json").exists():
            words = ["--base", base, "-e", f"expert={expert}", "-s", rows, "--set", "samples.count=4", "--set", "samples.template=false"]
            bench.recall("stats", *words, "--json", "--quiet")
    runs, out = bench.work / "runs", {name: bench.work / "out" / name for name in ("aligned", "uniform")}
    warm = llamas(bench, "tiny", TINY, 3)
    files = {name: recall_run(runs / f"{name}.yaml", [base, *experts], rows, method) for name, method in METHODS.items()}
    ready = {name: recall_run(runs / f"{name}-warm.yaml", warm, rows, method) for name, method in METHODS.items()}

    def inside(name: str) -> Side:
        job = {"do": "merge", "run": str(files[name]), "warm": str(ready[name]), "out": str(out[name]), "sets": {"threads": 1}}
        return Side(lambda: bench.inside("ours", job), out[name])

    done = bench.in_turn({name: inside(name) for name in METHODS})
    case = f"{len(experts)} LoRAs on SmolLM2-135M, one thread"
    yield Figure("stats.merge", case, [run.seconds for run in done["aligned"]], note=f"{done['aligned'][0].processor:.1f} processor s")
    pairs = zip(done["aligned"], done["uniform"], strict=True)
    yield Figure("stats.merge.memory", case, [a.anonymous / b.anonymous for a, b in pairs], [a.anonymous / GB for a in done["aligned"]])
    for folder in out.values():
        remove(folder)


def large(bench: Bench) -> Iterator[Figure]:
    """The first blocks of an 8B-shaped Llama on two threads."""
    shape = QUICK if bench.quick else L8B
    fewer = shape | {"num_hidden_layers": min(BLOCKS, shape["num_hidden_layers"])}
    base, expert = llamas(bench, "8b-blocks", fewer, 2, zeros=["lm_head.weight"])
    rows, out = write_rows(bench.work / "runs" / "statistics-8b.jsonl", SAMPLES, 100), bench.work / "out" / "statistics-8b"
    samples = {"path": str(rows), "count": SAMPLES, "max_tokens": 70, "template": False}
    run = {"base": str(base), "experts": [{"name": "expert", "path": str(expert)}], "samples": samples, "threads": 2}
    done = bench.inside("input_statistics", {"run": run, "out": str(out)})
    remove(out)
    case, blocks = f"8B bfloat16, {BLOCKS} blocks, two threads", fewer["num_hidden_layers"]
    directions = done.output["directions"] / blocks
    note = f"{done.output['tokens']} tokens; {done.processor:.0f} processor s in all; {directions:.1f} s a block are for directions"
    yield Figure("stats.large.time", case, [done.output["inputs"] / blocks], note=note)
    yield Figure("stats.large.memory", case, [done.anonymous / GB])


def do(job: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of the parts of `make_statistics`, in a process of its own."""
    from recall_merge import MergeRun
    from recall_merge.merging import statistics
    from recall_merge.models.input_moments import InputSketches

    seconds = dict.fromkeys((*TIMES, "directions"), 0.0)

    def timed(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] += time.perf_counter() - start

        return call

    places = [(statistics, function, name) for name, function in TIMES.items()]
    places += [(InputSketches, "fold", "directions"), (InputSketches, "finish", "directions")]
    patches = [patch.object(place, function, timed(name, getattr(place, function))) for place, function, name in places]
    for each in patches:
        each.start()
    cpu = time.process_time()
    try:
        made = statistics.make_statistics(MergeRun.model_validate(job["run"]), folder=Path(job["out"]))
    finally:
        for each in patches:
            each.stop()
    return {**seconds, "cpu": time.process_time() - cpu, "tokens": made.facts["tokens"]}


def errors(stats: Path, base: Path, expert: Path, rows: Path) -> tuple[float, float]:
    """Median and largest spectral error of the stored moments, as a share of the largest eigenvalue, in the first and last blocks.

    Against dense float64 moments of what PEFT's own merge reads of the same rows, cut to as many directions by numpy.
    """
    import peft
    from transformers import AutoModelForCausalLM

    from recall_merge.files.rows import read_rows
    from recall_merge.files.statistics import open_statistics
    from recall_merge.models.load import load_tokenizer
    from recall_merge.models.tokens import encode_rows

    made = open_statistics(stats)
    assert made is not None
    by_index = {row.index: row for row in read_rows(rows)}
    encoded = encode_rows([by_index[index] for index in made.facts["rows"]], load_tokenizer(base), template=False)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    model: Any = peft.PeftModel.from_pretrained(model, str(expert)).merge_and_unload().eval()
    blocks = model.model.layers
    read: dict[str, list[Tensor]] = {}
    for number in {0, len(blocks) // 2, len(blocks) - 1}:
        for name, module in blocks[number].named_modules():
            if f"{(name := f'model.layers.{number}.{name}')}.weight" in made.facts["tensors"]:
                module.register_forward_pre_hook(lambda _, args, name=name: read.setdefault(name, []).append(args[0][0].double()))
    with torch.inference_mode():
        for row in encoded:
            model.model(torch.tensor([row.input_ids]))
    found = []
    for name, parts in read.items():
        moment = made.moment(f"{name}.weight")
        assert moment is not None
        x = torch.cat(parts)
        dense = x.mT @ x / len(x)
        values, vectors = torch.linalg.eigh(dense)
        factor = vectors[:, -moment[0].factor.shape[1] :] * values[-moment[0].factor.shape[1] :].clamp(min=0).sqrt()
        wanted = factor @ factor.mT + torch.diag((dense.diagonal() - factor.square().sum(1)).clamp(min=0))
        found.append(float(torch.linalg.matrix_norm(moment[0].dense().double() - wanted, 2) / values[-1]))
    if max(found) > 0.05:
        raise WrongError(f"a stored moment is off by {max(found):.2g} of its largest eigenvalue")
    return sorted(found)[len(found) // 2], max(found)


if __name__ == "__main__":
    print(json.dumps(do(json.loads(sys.argv[1]))))
