"""An 8B-shaped Llama and three experts: the memory that the plan predicts, and the memory that the first four blocks take.

The whole model is sparse files, of which the plan reads headers. The four blocks are models of the same widths with random numbers; only
the head is zeros. Nothing that the pass holds grows with the number of blocks (`python -m benchmarks recall` doubles it), so the peak of
four blocks is that of 32, except for a reload of the result.
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
CASE = "8B bfloat16, base and 3 experts"


def measure(bench: Bench) -> Iterator[Figure]:
    shape = QUICK if bench.quick else L8B
    rows = write_rows(bench.work / "runs" / "large.jsonl", 24, 100)
    whole = recall_run(bench.work / "runs" / "large.yaml", sparse_llamas(bench, "8b", shape, EXPERTS + 1), rows, count=20)
    fewer = shape | {"num_hidden_layers": min(BLOCKS, shape["num_hidden_layers"])}
    few = llamas(bench, "8b-blocks", fewer, EXPERTS + 1, zeros=["lm_head.weight"])
    blocks = recall_run(bench.work / "runs" / "large-blocks.yaml", few, rows, count=20)
    out = bench.work / "out" / "large"

    planned = bench.recall("plan", whole, "--out", out, "--json")
    note = f"{planned.output['bytes_read'] / GB:.0f} GB to read; the plan itself {planned.wall:.1f} s"
    yield Figure("large.plan", CASE, [planned.output["memory"] / GB], note=note)
    predicted = bench.recall("plan", blocks, "--out", out, "--json").output["memory"] / GB
    for reload in (False,) if bench.quick else (False, True):
        remove(out)
        merged = bench.recall("merge", blocks, "--out", out, "--quiet", "--set", f"out.reload={reload}")
        size = sum(weights.stat().st_size for weights in weight_files(out)) / GB
        note = f"{merged.wall:.0f} s for a result of {size:.1f} GB; the plan predicts {predicted:.2f} GB beside interpreter and libraries"
        yield Figure("large.memory", f"{CASE}{'; `out.reload: true`' if reload else ''}", [merged.anonymous / GB], note=note)
    weights = record_weights(out)
    check(out, few, weights)
    remove(out)

    yield Figure("large.weights.plan", CASE, [predicted_for_weights(whole) / GB])
    compared = bench.recall("weights", blocks, "--json", "--quiet")
    if not torch.allclose(torch.tensor(compared.output["weights"]["rows"], dtype=torch.float64), weights, atol=1e-6):
        raise WrongError("`recall weights` and `recall merge` give different weights")
    note = f"{compared.wall:.0f} s; the plan says {predicted_for_weights(blocks) / GB:.2f} GB beside interpreter and libraries"
    yield Figure("large.weights.memory", CASE, [compared.anonymous / GB], note=note)
    for model in [] if bench.quick else few:
        shutil.rmtree(model)  # 11 GB


def predicted_for_weights(file: Path) -> int:
    """Bytes that the plan of `recall weights` predicts beside interpreter and libraries."""
    from recall_merge.merging.cost import weights_memory
    from recall_merge.merging.plan import make_plan
    from recall_merge.merging.run import load_run

    return weights_memory(make_plan(load_run(file), writes=False))


def record_weights(out: Path) -> torch.Tensor:
    """The weights of the record.    -> (L + 2, n)"""
    weights = torch.tensor(json.loads((out / "record.json").read_text())["weights"]["rows"], dtype=torch.float64)
    if not torch.allclose(weights.sum(1), torch.ones(len(weights), dtype=torch.float64)):
        raise WrongError("weights do not sum to 1")
    return weights


def check(out: Path, models: Sequence[Path], weights: torch.Tensor) -> None:
    """Check that tensors of the first block and the last are the experts' mean by these weights.

    Raises:
        WrongError: if not.
    """
    for block in (0, len(weights) - 3):
        name = f"model.layers.{block}.self_attn.k_proj.weight"
        check_tensor(name, read(out, name), [read(model, name) for model in models[1:]], weights[block + 1].tolist(), slack=4e-6)
