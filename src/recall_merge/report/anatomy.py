"""What a merge did to the parameters, layer by layer: how large each expert's change is, how the changes agree, and what of each is kept.

It reads base, experts and result once, tensor by tensor, and is kept beside the report: it is done again only when the inputs have changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recall_merge.files.adapter import is_adapter, open_adapter
from recall_merge.files.checkpoint import Checkpoint, open_checkpoint, read_json
from recall_merge.files.durable import write_whole
from recall_merge.files.experts import AdapterExpert, Expert, FullExpert, widen
from recall_merge.files.names import named_like
from recall_merge.files.record import RECORD
from recall_merge.files.statistics import InputStatistics, open_statistics
from recall_merge.merging.run import skipped
from recall_merge.runtime.errors import CheckpointError
from recall_merge.runtime.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1


@dataclass(frozen=True)
class Models:
    """Where the models of a result are. `statistics` are those of the experts that have one."""

    base: Path
    experts: Mapping[str, Path]
    statistics: Mapping[str, Path]


def anatomy(folder: Path, models: Models, keep: Path, progress: Progress) -> dict[str, Any]:
    """Sizes, cosines and what is missed, as tables in the form of `record.json`.

    sizes     |delta| / |theta_0| of each expert and of the merge, Frobenius norms over all merged tensors of a layer;
    cosines   <delta_p, delta_q> / (|delta_p| |delta_q|) of each pair of experts; None where one changes nothing;
    missed    sum tr((D - delta_q) G_q (D - delta_q)^T) / sum tr(delta_q G_q delta_q^T) over the linear maps of a layer, with D the merge's
              own change and G_q the second moments of expert q's statistics: 0 = on its typical inputs the merge answers as the expert does,
              1 = as the base does, as far from it as that. Only of experts with input statistics.

    Args:
        keep: a file that keeps the answer for the next time.

    Raises:
        CheckpointError: if a model cannot be read.
    """
    result, base = open_checkpoint(folder), open_checkpoint(models.base)
    experts = [_open(name, path, base) for name, path in models.experts.items()]
    statistics = {name: stats for name, path in models.statistics.items() if (stats := open_statistics(path))}
    key = _key(folder, models)
    if (known := _kept(keep, key)) is not None:
        return known
    names = [name for name in result.tensors if name in base.tensors and _is_merged(folder, result, name)]
    found = Sums([expert.name for expert in experts], result.layers.last + 1)
    with progress.stage("comparing the changes", sum(result.tensors[name].spec.nbytes for name in names), "bytes") as advance:
        for name in names:
            stored = base.read(name)
            spec = result.tensors[name].spec
            shapes = {tuple(own.shape) for one in experts if (own := one.spec(name)) is not None}
            if shapes | {tuple(spec.shape)} == {tuple(stored.shape)}:  # tables of tokens that grew have no change to speak of
                found.add(result.layers.of(name), name, widen(stored), widen(result.read(name)), experts, statistics)
            advance(spec.nbytes)
    tables = found.tables()
    write_whole(keep, json.dumps({"format": FORMAT, "key": key, "tables": tables}) + "\n")
    return tables


class Sums:
    """Sums over the tensors of each layer, in float64."""

    def __init__(self, names: list[str], layers: int) -> None:
        import torch

        k = len(names)
        self._names, self._layers = names, layers
        self._base = torch.zeros(layers, dtype=torch.float64)
        self._products = torch.zeros(layers, k + 1, k + 1, dtype=torch.float64)  # of the experts' changes and, last, the merge's
        self._missed = torch.zeros(layers, k, 2, dtype=torch.float64)  # what is missed, and what there was
        self._with_statistics: set[str] = set()

    def add(
        self, layer: int, name: str, base: Tensor, merged: Tensor, experts: list[Expert], statistics: Mapping[str, InputStatistics]
    ) -> None:
        import torch

        from recall_merge.maths.deltas import dense

        deltas = [torch.zeros_like(base) if (delta := one.delta(name, base)) is None else dense(delta) for one in experts]
        merged = merged - base
        flat = torch.stack([delta.flatten() for delta in (*deltas, merged)])
        self._base[layer] += base.double().square().sum()
        self._products[layer] += (flat @ flat.mT).double()
        for place, (expert, delta) in enumerate(zip(experts, deltas, strict=True)):
            moment = statistics[expert.name].moment(name) if expert.name in statistics else None
            if moment is not None:
                self._with_statistics.add(expert.name)
                known, axis = moment
                for column, difference in enumerate((merged - delta, delta)):
                    change = difference if axis == 1 else difference.mT
                    answered = (change @ known.factor).square().sum() + (change.square() @ known.rest).sum()
                    self._missed[layer, place, column] += answered.double()

    def tables(self) -> dict[str, Any]:
        norms = self._products.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()  # (layers, k + 1)
        sizes = [[_ratio(norm, base.sqrt()) for norm in row] for row, base in zip(norms, self._base, strict=True)]
        pairs = list(combinations(range(len(self._names)), 2))
        cosines = [
            [_ratio(self._products[layer, p, q], norms[layer, p] * norms[layer, q]) for p, q in pairs] for layer in range(self._layers)
        ]
        with_statistics = [place for place, name in enumerate(self._names) if name in self._with_statistics]
        missed = [[_ratio(*self._missed[layer, place]) for place in with_statistics] for layer in range(self._layers)]
        return {
            "sizes": self._table([*self._names, "the merge"], sizes),
            "cosines": self._table([f"{self._names[p]} · {self._names[q]}" for p, q in pairs], cosines),
            "missed": self._table([self._names[place] for place in with_statistics], missed),
        }

    def _table(self, names: list[str], rows: list[list[float | None]]) -> dict[str, Any]:
        return {"experts": names, "layers": list(range(self._layers)), "rows": rows}


def _ratio(part: Tensor, whole: Tensor) -> float | None:
    return float(part / whole) if whole > 0 else None


def _is_merged(folder: Path, result: Checkpoint, name: str) -> bool:
    skip = read_json(folder / RECORD)["run"].get("skip", [])
    return result.tensors[name].spec.is_float and not skipped(name, skip)


def _open(name: str, path: Path, base: Checkpoint) -> Expert:
    if is_adapter(path):
        return AdapterExpert(name, open_adapter(path, base))
    return FullExpert(name, named_like(open_checkpoint(path), base))


def _key(folder: Path, models: Models) -> str:
    """What the answer depends on, told without reading weights: the record, and what tells each model from others."""
    from recall_merge.continual.keys import fingerprint

    parts = [(folder / RECORD).read_text("utf-8"), *(fingerprint(path) for path in (models.base, *models.experts.values()))]
    parts += [(path / "stats.json").read_text("utf-8") for path in models.statistics.values()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _kept(keep: Path, key: str) -> dict[str, Any] | None:
    try:
        data = read_json(keep) if keep.is_file() else {}
    except CheckpointError:
        return None
    return data["tables"] if data.get("format") == FORMAT and data.get("key") == key else None
