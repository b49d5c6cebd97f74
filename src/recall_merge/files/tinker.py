"""Adapters in the words of Tinker, as tinker-cookbook 0.6.1 maps them onto a model (its `weights/_merge.py` and `_merge_utils.py`).

The head is `unembed_tokens`; GPT-OSS's attention is `attn`. The experts of a block are stacked, `w1` (gate_proj), `w3` (up_proj) and `w2`
(down_proj): A (E, r, in) and B (E, out, r), one of which has E = 1 where all experts share it. They are taken where the base's files hold
each expert's matrix under the cookbook's name. Experts that the files hold in one tensor, and projections that Tinker splits (`in_proj_q`,
`in_proj_k` and `in_proj_v` of Qwen3.5; `gate_proj` and `x_proj` of Nemotron's Mamba), are refused.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path

from recall_merge.files.checkpoint import Checkpoint
from recall_merge.files.edits import OTHER_BASE
from recall_merge.files.names import Names, unwrapped
from recall_merge.files.safetensors import StoredTensor, TensorSpec
from recall_merge.runtime.errors import CheckpointError, Faults

MAKE_WHOLE = "make a whole model of it with tinker-cookbook's `weights.build_hf_model`, and give that folder"
HEAD = ".model.unembed_tokens.lora_"
MATRICES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
STACKED = re.compile(r"(?P<experts>.+\.experts)\.(?P<matrix>w[123])\.(?P<factor>lora_[AB])\.weight")


def is_tinkers(stored: Mapping[str, StoredTensor]) -> bool:
    """Whether an adapter's file has names that only Tinker gives."""
    return any(HEAD in key or STACKED.fullmatch(key) for key in stored)


def in_pefts_words(
    stored: Mapping[str, StoredTensor], base: Checkpoint, names: Names, *, rank: int, where: Path, faults: Faults
) -> dict[str, StoredTensor]:
    """An adapter's parts by the names that PEFT would give them; stacked experts one by one. What cannot be taken apart is a fault."""
    renamed: dict[str, StoredTensor] = {}
    stacks: defaultdict[tuple[str, str], dict[str, StoredTensor]] = defaultdict(dict)
    for key, part in stored.items():
        if match := STACKED.fullmatch(key):
            stacks[unwrapped(match["experts"]), match["matrix"]][match["factor"]] = part
        elif base.config.get("model_type") == "gpt_oss":
            renamed[key.replace(".attn.", ".self_attn.").replace(HEAD, ".lm_head.lora_")] = part
        else:
            renamed[key.replace(HEAD, ".lm_head.lora_")] = part
    for (experts, matrix), factors in stacks.items():
        with faults.collect():
            renamed |= _one_by_one(experts, matrix, factors, base, names, rank=rank, where=where)
    return renamed


def _one_by_one(
    experts: str, matrix: str, factors: Mapping[str, StoredTensor], base: Checkpoint, names: Names, *, rank: int, where: Path
) -> Iterator[tuple[str, StoredTensor]]:
    """The factors of each expert's matrix, by PEFT's names."""
    one = f".experts.0.{MATRICES[matrix]}.weight"
    if (first := names.find(experts.removesuffix(".experts") + one)) is None:
        what = f"the adapter stacks '{experts}.{matrix}'; the base's files hold no '{MATRICES[matrix]}' of each expert"
        raise CheckpointError(what, where=where, fix=MAKE_WHOLE)
    number = next(at for at in count() if first.removesuffix(one) + one.replace("0", str(at)) not in base.tensors)
    shapes = {factor: part.spec.shape for factor, part in factors.items()}
    down, up = (shapes.get(f"lora_{each}", ()) for each in "AB")
    if {len(down), len(up)} != {3} or {down[0], up[0]} not in ({1, number}, {number}) or (down[1], up[2]) != (rank, rank):
        what = f"the adapter's factors of '{experts}.{matrix}' are of shapes {up} and {down}: not of {number} experts and rank {rank}"
        raise CheckpointError(what, where=where, fix=OTHER_BASE)
    for factor, part in factors.items():
        spec = TensorSpec(part.spec.dtype, part.spec.shape[1:])
        for expert in range(number):
            begin = part.begin + (spec.nbytes * expert if part.spec.shape[0] > 1 else 0)
            yield f"{experts}.{expert}.{MATRICES[matrix]}.{factor}.weight", replace(part, spec=spec, begin=begin)
