"""Adapters in the words of Tinker, as tinker-cookbook 0.6.1 maps them onto a model (its `weights/_merge*.py`).

- `unembed_tokens` is the head; `attn` of GPT-OSS is `self_attn`.
- The experts of a block are stacked, `w1` (gate_proj), `w3` (up_proj) and `w2` (down_proj): A (E, r, in) and B (E, out, r). One of the two
  has E = 1 where all experts share it. The base's files hold each expert's matrix, or `gate_up_proj` (E, gate and up, in) and `down_proj`.
- `in_proj_q`, `in_proj_k` and `in_proj_v` of Qwen3.5 change the rows of `in_proj_qkv`, in this order.

All else is refused: experts that are stored as (in, out), as those of GPT-OSS and Qwen3-VL are, and the parts of Nemotron's Mamba.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path

from recall_merge.files.checkpoint import Checkpoint
from recall_merge.files.edits import COPY_AGAIN, OTHER_BASE, Edit, JoinedFactors
from recall_merge.files.names import Names, unwrapped
from recall_merge.files.safetensors import StoredTensor, TensorSpec
from recall_merge.runtime.errors import CheckpointError, Faults

MAKE_WHOLE = "make a whole model of it with tinker-cookbook's `weights.build_hf_model`, and give that folder"
HEAD = ".model.unembed_tokens.lora_"
MATRICES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
FUSED = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
SPLIT = ("in_proj_q", "in_proj_k", "in_proj_v")
PIECE = re.compile(
    r"(?P<module>.+\.experts(?=\.w)|.+\.linear_attn(?=\.in_proj))\.(?P<piece>w[123]|in_proj_[qkv])\.(?P<factor>lora_[AB])\.weight"
)
Pieces = Mapping[str, Mapping[str, StoredTensor]]
"""The factors of one module, by the piece that they change, and A or B."""


def is_tinkers(stored: Mapping[str, StoredTensor]) -> bool:
    """Whether an adapter's file has names that only Tinker gives."""
    return any(HEAD in key or PIECE.fullmatch(key) for key in stored)


class Tinker:
    """Translates an adapter's parts: into those that PEFT would have stored, and edits of tensors that several parts make together."""

    def __init__(self, base: Checkpoint, names: Names, scale: Callable[[str, int], float], *, rank: int, where: Path) -> None:
        self._base, self._names, self._scale, self._rank, self._where = base, names, scale, rank, where

    def translated(self, stored: Mapping[str, StoredTensor], faults: Faults) -> tuple[dict[str, StoredTensor], dict[str, Edit]]:
        """What cannot be translated goes to the faults."""
        parts: dict[str, StoredTensor] = {}
        edits: dict[str, Edit] = {}
        modules: defaultdict[str, defaultdict[str, dict[str, StoredTensor]]] = defaultdict(lambda: defaultdict(dict))
        for key, part in stored.items():
            if match := PIECE.fullmatch(key):
                modules[unwrapped(match["module"])][match["piece"]][match["factor"]] = part
            else:
                own = key.replace(".attn.", ".self_attn.") if self._base.config.get("model_type") == "gpt_oss" else key
                own = own.replace(HEAD, ".lm_head.lora_")
                if own != key and own in stored:
                    faults.add(f"the adapter holds both '{key}' and '{own}'", where=self._where, fix=COPY_AGAIN)
                parts[own] = part
        for module, pieces in modules.items():
            with faults.collect():
                if module.endswith(".experts") and self._names.find(f"{module}.0.down_proj.weight") is not None:
                    parts |= self._one_by_one(module, pieces)
                elif module.endswith(".experts"):
                    for matrix, wanted in FUSED.items():
                        edits |= self._joined(f"{module}.{matrix}", pieces, wanted)
                else:
                    edits |= self._joined(f"{module}.in_proj_qkv.weight", pieces, SPLIT)
        return parts, edits

    def _one_by_one(self, module: str, pieces: Pieces) -> Iterator[tuple[str, StoredTensor]]:
        """The factors of each expert's matrix."""
        for piece, factors in pieces.items():
            matrix = MATRICES[piece]
            first = self._found(f"{module}.0.{matrix}.weight")
            stem = first.removesuffix(f".0.{matrix}.weight")
            number = next(at for at in count() if f"{stem}.{at}.{matrix}.weight" not in self._base.tensors)
            for kind, part in zip("AB", self._checked(f"{module}.{piece}", factors, number), strict=True):
                spec = TensorSpec(part.spec.dtype, part.spec.shape[1:])
                for expert in range(number):
                    begin = part.begin + (spec.nbytes * expert if part.spec.shape[0] > 1 else 0)
                    yield f"{module}.{expert}.{matrix}.lora_{kind}.weight", replace(part, spec=spec, begin=begin)

    def _joined(self, parameter: str, pieces: Pieces, wanted: tuple[str, ...]) -> Iterator[tuple[str, Edit]]:
        """The edit of a tensor whose rows the pieces change in turn."""
        name, module = self._found(parameter), parameter.removesuffix(".weight")
        shape = self._base.tensors[name].spec.shape
        experts = shape[0] if len(shape) == 3 else None
        if experts is not None and not self._is_whole_and_upright(name, parameter):
            what = f"the adapter changes '{parameter}', which the base does not hold as (experts, out, in)"
            raise CheckpointError(what, where=self._where, fix=MAKE_WHOLE)
        owner = module.rpartition(".")[0]
        downs, ups = zip(*(self._checked(f"{owner}.{piece}", pieces.get(piece, {}), experts) for piece in wanted), strict=True)
        up, down = JoinedFactors(ups, True, experts), JoinedFactors(downs, False, experts)
        yield name, Edit(up=up, down=down, scale=self._scale(module, self._rank))

    def _is_whole_and_upright(self, name: str, parameter: str) -> bool:
        """Whether a tensor of the files is this parameter in memory, and holds (out, in) of each expert."""
        return any(model.place(name) == (parameter, "") and not model.is_transposed(parameter) for model in self._names.models)

    def _found(self, wanted: str) -> str:
        if (name := self._names.find(wanted)) is None:
            what = f"the adapter changes a part of '{wanted}', which the base's files do not hold"
            raise CheckpointError(what, where=self._where, fix=MAKE_WHOLE)
        return name

    def _checked(self, piece: str, factors: Mapping[str, StoredTensor], experts: int | None) -> tuple[StoredTensor, StoredTensor]:
        """A and B of a piece; of all experts, or of a matrix."""
        shapes = {factor: part.spec.shape for factor, part in factors.items()}
        down, up = (shapes.get(f"lora_{each}", ()) for each in "AB")
        lead = {down[:-2], up[:-2]}
        fits = lead == {()} if experts is None else lead in ({(1,), (experts,)}, {(experts,)})
        if not (fits and len(down) == len(up) == (2 if experts is None else 3) and down[-2] == up[-1] == self._rank):
            of = "" if experts is None else f" and {experts} experts"
            what = f"the adapter's factors of '{piece}' are of shapes {up} and {down}: not of rank {self._rank}{of}"
            raise CheckpointError(what, where=self._where, fix=OTHER_BASE)
        return factors["lora_A"], factors["lora_B"]
