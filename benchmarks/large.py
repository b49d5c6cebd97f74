"""An 8B-shaped Llama and three experts: what `recall plan` tells, and the memory of the merge of its first four blocks.

The whole model is sparse files, of which the plan reads headers. The four blocks are models of the same widths with random numbers; the
head alone is zeros. Nothing that the pass holds grows with the number of blocks (`python -m benchmarks recall` doubles it), so the peak of
four is that of 32, but for what the check of the result loads, which `recall plan` tells.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.bars import Figure
from benchmarks.expected import WrongError, check_tensor, read
from benchmarks.inputs import L8B, QUICK, llamas, recall_run, sparse_llamas, weight_files, write_rows
from benchmarks.measure import GB, Bench, remove

BLOCKS, EXPERTS = 4, 3


def measure(bench: Bench) -> Iterator[Figure]:
    shape = QUICK if bench.quick else L8B
    rows = write_rows(bench.work / "runs" / "large.jsonl", 24, 100)
    whole = recall_run(bench.work / "runs" / "large.yaml", sparse_llamas(bench, "8b", shape, EXPERTS + 1), rows, count=20)
    out = bench.work / "out" / "large"
    told = {name: bench.recall("plan", whole, "--out", out, "--json", "--set", f"out.reload={name}") for name in ("true", "false")}
    case = "8B bfloat16, base and 3 experts"
    yield Figure("large.plan", f"{case}; all checks", [told["true"].told["memory"] / GB])
    note = f"{told['false'].told['bytes_read'] / GB:.0f} GB to read; the plan itself {told['false'].wall:.1f} s"
    yield Figure("large.plan", f"{case}; `out.reload: false`", [told["false"].told["memory"] / GB], note=note)

    fewer = shape | {"num_hidden_layers": min(BLOCKS, shape["num_hidden_layers"])}
    few = llamas(bench, "8b-blocks", fewer, EXPERTS + 1, zeros=["lm_head.weight"])
    file = recall_run(bench.work / "runs" / "large-blocks.yaml", few, rows, count=20)
    planned = bench.recall("plan", file, "--out", out, "--json", "--set", "out.reload=false").told["memory"]
    for checked in (False,) if bench.quick else (True, False):
        remove(out)
        merged = bench.recall("merge", file, "--out", out, "--quiet", "--set", f"out.reload={checked}")
        words = "all checks" if checked else "`out.reload: false`"
        size = sum(weights.stat().st_size for weights in weight_files(out)) / GB
        note = f"{merged.wall:.0f} s; the plan says {planned / GB:.2f} GB beside interpreter and libraries without the check of the result"
        note += f", a result of {size:.1f} GB"
        yield Figure("large.memory", f"{case}; {words}", [merged.anonymous / GB], note=note)
    check(out, few)
    remove(out)
    for model in [] if bench.quick else few:
        shutil.rmtree(model)  # 11 GB


def check(out: Path, models: Sequence[Path]) -> None:
    """Tensors of the first block and the last are the experts' mean by the record's weights.

    Raises:
        WrongError: if not.
    """
    weights = torch.tensor(json.loads((out / "record.json").read_text())["weights"]["rows"], dtype=torch.float64)
    if not torch.allclose(weights.sum(1), torch.ones(len(weights), dtype=torch.float64)):
        raise WrongError("weights do not sum to 1")
    for block in (0, len(weights) - 3):
        name = f"model.layers.{block}.self_attn.k_proj.weight"
        check_tensor(name, read(out, name), [read(model, name) for model in models[1:]], weights[block + 1].tolist(), slack=4e-6)
