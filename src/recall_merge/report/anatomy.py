"""What a merge did to the parameters, layer by layer: how large each delta is, how the deltas agree, and what the merge keeps of each.

Base, experts and result are read once, tensor by tensor. The answer is kept in a file, and computed again only when its inputs change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recall_merge.files.adapter import is_adapter, open_adapter
from recall_merge.files.checkpoint import Checkpoint, open_checkpoint
from recall_merge.files.experts import AdapterExpert, Expert, FullExpert, widen
from recall_merge.files.record import RECORD
from recall_merge.files.same_architecture import named_like
from recall_merge.files.statistics import InputStatistics, open_statistics
from recall_merge.maths.deltas import dense
from recall_merge.merging.run import skipped
from recall_merge.runtime.durable import write_whole
from recall_merge.runtime.errors import CheckpointError
from recall_merge.runtime.progress import Progress
from recall_merge.runtime.sealed import read_sealed, sealed

FORMAT = 1
MERGE = "the merge"


@dataclass(frozen=True)
class Models:
    """Folders of the models behind a result, and where input statistics of the experts may be."""

    base: Path
    experts: Mapping[str, Path]
    statistics: Mapping[str, Path]


def anatomy(folder: Path, models: Models, cache: Path, progress: Progress, *, identities: Sequence[str] = ()) -> dict[str, Any]:
    """Sizes, cosines and what is missed, as tables in the form of `record.json`.

    sizes     |delta| / |theta_0| of each expert and of the merge: Frobenius norms over all merged tensors of a layer;
    cosines   <delta_p, delta_q> / (|delta_p| |delta_q|) of each pair of experts; None where one of them is 0;
    missed    sum tr((D - delta_q) G_q (D - delta_q)^T) / sum tr(delta_q G_q delta_q^T) over the linear maps of a layer, with D the merge's
              delta and G_q the second moments in the statistics of expert q. 0: on its typical inputs the merge answers as the expert
              does; 1: the merge is as far from it as the base. Only for experts with input statistics.

    Args:
        cache: the file that keeps the answer.
        identities: what tells the models from others, unless they were compared with the result's record.

    Raises:
        CheckpointError: if a model cannot be read.
    """
    statistics = {name: stats for name, path in models.statistics.items() if (stats := open_statistics(path))}
    record = read_sealed(folder / RECORD)
    key = hashlib.sha256(
        "\n".join([json.dumps(record), *identities, *(json.dumps(stats.facts) for stats in statistics.values())]).encode()
    ).hexdigest()
    if (cached := _read_cache(cache, key)) is not None:
        return cached
    result, base = open_checkpoint(folder), open_checkpoint(models.base)
    experts = [_open(name, path, base) for name, path in models.experts.items()]
    skip = record["run"].get("skip", [])
    names = [name for name, stored in result.tensors.items() if name in base.tensors and stored.spec.is_float and not skipped(name, skip)]
    sums = LayerSums([expert.name for expert in experts], result.layers.last + 1)
    with progress.stage("comparing the deltas", sum(result.tensors[name].spec.nbytes for name in names), "bytes") as advance:
        for name in names:
            stored, spec = base.read(name), result.tensors[name].spec
            shapes = {tuple(own.shape) for expert in experts if (own := expert.spec(name)) is not None}
            if shapes | {tuple(spec.shape)} == {tuple(stored.shape)}:  # a table of tokens that grew has no delta
                sums.add(result.layers.of(name), name, widen(stored), widen(result.read(name)), experts, statistics)
            advance(spec.nbytes)
    tables = sums.tables()
    write_whole(cache, sealed({"format": FORMAT, "key": key, "tables": tables}, indent=None))
    return tables


class LayerSums:
    """Sums over the tensors of each layer, in float64."""

    def __init__(self, experts: list[str], layers: int) -> None:
        k = len(experts)
        self._experts, self._layers = experts, layers
        self._base = torch.zeros(layers, dtype=torch.float64)  # |theta_0|^2
        self._products = torch.zeros(layers, k + 1, k + 1, dtype=torch.float64)  # of the experts' deltas and, last, the merge's
        self._missed = torch.zeros(layers, k, 2, dtype=torch.float64)  # numerator and denominator
        self._measured: set[str] = set()  # experts with statistics

    def add(
        self, layer: int, name: str, base: Tensor, merged: Tensor, experts: list[Expert], statistics: Mapping[str, InputStatistics]
    ) -> None:
        deltas = [torch.zeros_like(base) if (delta := expert.delta(name, base)) is None else dense(delta) for expert in experts]
        merged = merged - base
        flat = torch.stack([delta.flatten() for delta in (*deltas, merged)])
        self._base[layer] += base.double().square().sum()
        self._products[layer] += (flat @ flat.mT).double()
        for number, (expert, delta) in enumerate(zip(experts, deltas, strict=True)):
            if (known := statistics.get(expert.name)) is None:
                continue
            for matrix in range(len(base)) if base.ndim == 3 else (None,):  # of a mixture's experts
                if (found := known.moment(name, matrix)) is None:
                    continue
                self._measured.add(expert.name)
                moment, axis = found
                for part, difference in enumerate((merged - delta, delta)):
                    change = difference if matrix is None else difference[matrix]
                    change = change if axis == 1 else change.mT
                    answer = (change @ moment.factor).square().sum() + (change.square() @ moment.rest).sum()
                    self._missed[layer, number, part] += answer.double()

    def tables(self) -> dict[str, Any]:
        norms = self._products.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()  # (layers, k + 1)
        pairs = list(combinations(range(len(self._experts)), 2))
        measured = [number for number, name in enumerate(self._experts) if name in self._measured]
        sizes = [[_ratio(norm, base.sqrt()) for norm in row] for row, base in zip(norms, self._base, strict=True)]
        cosines = [
            [_ratio(product[p, q], norm[p] * norm[q]) for p, q in pairs] for product, norm in zip(self._products, norms, strict=True)
        ]
        missed = [[_ratio(*row[number]) for number in measured] for row in self._missed]
        return {
            "sizes": self._table([*self._experts, MERGE], sizes),
            "cosines": self._table([f"{self._experts[p]} · {self._experts[q]}" for p, q in pairs], cosines),
            "missed": self._table([self._experts[number] for number in measured], missed),
        }

    def _table(self, names: list[str], rows: list[list[float | None]]) -> dict[str, Any]:
        return {"experts": names, "layers": list(range(self._layers)), "rows": rows}


def _ratio(part: Tensor, whole: Tensor) -> float | None:
    return float(part / whole) if whole > 0 else None


def _open(name: str, path: Path, base: Checkpoint) -> Expert:
    if is_adapter(path):
        return AdapterExpert(name, open_adapter(path, base))
    return FullExpert(name, named_like(open_checkpoint(path), base))


def _read_cache(cache: Path, key: str) -> dict[str, Any] | None:
    try:
        data = read_sealed(cache) if cache.is_file() else {}
    except CheckpointError:
        return None
    return data["tables"] if data.get("format") == FORMAT and data.get("key") == key else None
