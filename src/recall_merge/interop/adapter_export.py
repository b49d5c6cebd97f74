"""What a result adds to its base, as a LoRA: which of PEFT's places each tensor has, of which rank, and the factors."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recall_merge.files.adapter import CONFIG, PREFIX, WEIGHTS
from recall_merge.files.checkpoint import Checkpoint
from recall_merge.files.experts import AdapterExpert
from recall_merge.files.names import Names
from recall_merge.files.output import OutputFolder, Shard, WeightWriter
from recall_merge.files.safetensors import Spec
from recall_merge.merging.result import Result
from recall_merge.runtime.errors import Faults, ResultError
from recall_merge.runtime.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from recall_merge.maths.deltas import LowRank
    from recall_merge.models.architecture import ParameterInfo


@dataclass(frozen=True)
class ExportedAdapter:
    """An adapter.

    Attributes:
        path: its folder.
        error: |delta - adapter| / |delta| over the whole model, in the Frobenius norm, delta = result - base as they are stored.
        errors: the same by layer, 0..L+1; 0 where nothing changed.
        ranks: the rank of every linear map that it changes.
        whole: tensors that it holds whole, because they are no linear maps.
        notes: what a reader should know.
    """

    path: Path
    error: float
    errors: tuple[float, ...]
    ranks: Mapping[str, int]
    whole: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class AdapterPlan:
    """An adapter before its numbers.

    Attributes:
        places: tensor of the base -> its modules in memory; a tied embedding has two.
        ranks: of the changed tensors that are weights of linear maps.
        whole: the other changed tensors.
        experts, parts: adapters, and what of each is in the result at each layer (L + 2, k), where it is their weighted sum.
    """

    result: Result
    base: Checkpoint
    places: Mapping[str, Sequence[ParameterInfo]]
    ranks: Mapping[str, int]
    whole: tuple[str, ...]
    experts: Sequence[AdapterExpert]
    parts: Tensor | None

    @property
    def biases(self) -> list[str]:
        """Changed biases of linear maps: PEFT stores them beside the factors."""
        return [name for name in self.whole if self.places[name][0].is_linear and self.places[name][0].part == "bias"]

    @property
    def modules(self) -> list[str]:
        """Modules that are stored whole."""
        return [place.module for name in self.whole if name not in self.biases for place in self.places[name]]

    def keys(self) -> dict[str, str]:
        """Key in the adapter's file -> the result's tensor, of all that is stored whole."""
        mapped = {self.places[name][0].module for name in self.ranks}
        found = {}
        for name in self.biases:
            module = self.places[name][0].module
            found[f"{PREFIX}{module}.{'base_layer.' if module in mapped else ''}bias"] = name
        stored = set(self.modules)
        for name, places in self.places.items():  # with what did not change in them, which PEFT would miss
            found |= {f"{PREFIX}{place.module}.{place.part}": name for place in places if place.module in stored}
        return found

    def specs(self) -> dict[str, Spec]:
        """The adapter's file: factors A (r, i) and B (o, r) of every linear map, then what is stored whole."""
        specs = {}
        for name, rank in self.ranks.items():
            place, (o, i) = self.places[name][0], self.base.tensors[name].spec.shape
            o, i = (i, o) if place.transposed else (o, i)
            specs |= {
                f"{PREFIX}{place.module}.lora_A.weight": Spec("F32", (rank, i)),
                f"{PREFIX}{place.module}.lora_B.weight": Spec("F32", (o, rank)),
            }
        return specs | {key: self.result.checkpoint.tensors[name].spec for key, name in self.keys().items()}


def plan_adapter(result: Result, base: Checkpoint, experts: Sequence[AdapterExpert], parts: Tensor | None, rank: int | None) -> AdapterPlan:
    """Find the place of everything that changed.

    Raises:
        ResultError: with every changed tensor that an adapter cannot hold; or if nothing changed.
    """
    places = _places(base)
    changed = [name for name in result.checkpoint.tensors if _changed(result, base, name)]
    faults = Faults()
    if not changed:
        faults.add("the result is its base: there is nothing to write", where=result.folder, fix="use the base")
    for name in changed:
        theirs, ours = result.checkpoint.tensors[name].spec.shape, base.tensors[name].spec.shape
        if theirs != ours:
            what = f"'{name}' is of shape {theirs}, in the base of {ours}: no adapter makes it so"
            faults.add(what, where=result.folder, fix="merge with `vocabulary: base`")
        elif name not in places:
            what = f"'{name}' changed, and is no parameter of its own in transformers' model: PEFT has no place for it"
            faults.add(what, where=result.folder, fix="use the result's own folder")
    faults.raise_any(ResultError)
    maps = [name for name in changed if len(places[name]) == 1 and places[name][0].is_linear and places[name][0].part == "weight"]
    if not maps:
        raise ResultError("no linear map changed, and a LoRA needs one", where=result.folder, fix="use the result's own folder")
    ranks = {name: _rank(base.tensors[name].spec.shape, name, experts, rank) for name in maps}
    return AdapterPlan(result, base, places, ranks, tuple(name for name in changed if name not in ranks), experts, parts)


def write_adapter(target: Path, plan: AdapterPlan, base_name: str, progress: Progress) -> ExportedAdapter:
    """Write it, whole or not at all; `base_name` is what its config calls the base."""
    from recall_merge.maths.low_rank import lost

    specs, layers = plan.specs(), plan.base.layers
    missed, sizes = [0.0] * (layers.last + 1), [0.0] * (layers.last + 1)
    bar = progress.stage("writing the adapter", sum(spec.nbytes for spec in specs.values()), "bytes")
    with OutputFolder(target, overwrite=False) as out:
        with bar as advance, WeightWriter(out.path, [Shard(WEIGHTS, specs)]) as writer:

            def add(key: str, tensor: Tensor) -> None:
                writer.add(key, tensor.to(specs[key].torch_dtype))
                advance(specs[key].nbytes)

            for name in plan.ranks:
                module, delta, factors = plan.places[name][0].module, _delta(plan, name), _factors(plan, name)
                down, up = (factors.up.mT, factors.down.mT) if plan.places[name][0].transposed else (factors.down, factors.up)
                add(f"{PREFIX}{module}.lora_A.weight", down.contiguous())
                add(f"{PREFIX}{module}.lora_B.weight", up.contiguous())
                part, size = lost(delta, factors)
                missed[layers.of(name)] += part
                sizes[layers.of(name)] += size
            for key, name in plan.keys().items():
                add(key, plan.result.checkpoint.read(name))
        for name in plan.whole:
            sizes[layers.of(name)] += float(_delta(plan, name).square().sum())
        (out.path / CONFIG).write_text(json.dumps(_config(plan, base_name), indent=2) + "\n", "utf-8")
        out.commit()
    errors = tuple((part / size) ** 0.5 if size else 0.0 for part, size in zip(missed, sizes, strict=True))
    return ExportedAdapter(target, (sum(missed) / sum(sizes)) ** 0.5, errors, plan.ranks, plan.whole, tuple(_notes(plan)))


def _places(base: Checkpoint) -> dict[str, list[ParameterInfo]]:
    from recall_merge.models.architecture import outline

    names, places = Names(base), {}
    for place in outline(base.folder):
        wanted = f"{place.module}.{place.part}"
        name = names.find(wanted) or (base.embedding if names.is_tied_head(wanted) else None)
        if name is not None:
            places.setdefault(name, []).append(place)
    return places


def _changed(result: Result, base: Checkpoint, name: str) -> bool:
    """Whether a tensor differs from the base's by more than its dtype."""
    import torch

    ours, theirs = base.tensors[name], result.checkpoint.tensors[name]
    if ours.spec.shape != theirs.spec.shape or ours.spec == theirs.spec:
        return not ours.same_bytes(theirs)
    return not torch.equal(ours.read().to(theirs.spec.torch_dtype), theirs.read())


def _rank(shape: tuple[int, ...], name: str, experts: Sequence[AdapterExpert], rank: int | None) -> int:
    """The rank asked for, or that of an exact adapter: of the experts' factors side by side where they are all there is."""
    factors = [edit.down for expert in experts if (edit := expert.adapter.edits.get(name)) is not None and edit.is_product]
    edits = [expert for expert in experts if name in expert.adapter.edits]
    exact = sum(down.spec.shape[0] for down in factors if down is not None) if edits and len(factors) == len(edits) else min(shape)
    return min(rank or exact, *shape)


def _delta(plan: AdapterPlan, name: str) -> Tensor:
    return plan.result.checkpoint.read(name).double() - plan.base.read(name).double()


def _factors(plan: AdapterPlan, name: str) -> LowRank:
    """The factors of one linear map, in the base's orientation."""
    from recall_merge.maths.deltas import LowRank
    from recall_merge.maths.low_rank import truncated
    from recall_merge.maths.singular_vectors import combined

    rank = plan.ranks[name]
    if plan.parts is not None:
        base = plan.base.read(name).double()
        found = [expert.delta(name, base) for expert in plan.experts]
        shares = plan.parts[plan.base.layers.of(name)].tolist()
        pairs = [(delta, share) for delta, share in zip(found, shares, strict=True) if delta is not None]
        if all(isinstance(delta, LowRank) for delta, _ in pairs):
            together = combined([delta for delta, _ in pairs], [share for _, share in pairs])
            assert isinstance(together, LowRank)
            return together if together.rank == rank else truncated(together, rank)
    return truncated(_delta(plan, name), rank)


def _config(plan: AdapterPlan, base_name: str) -> dict[str, Any]:
    """PEFT's own config of it. Modules are called by their whole names; where ranks differ, patterns give them, alpha = r everywhere."""
    from peft import LoraConfig

    by_module = {plan.places[name][0].module: rank for name, rank in plan.ranks.items()}
    common = Counter(by_module.values()).most_common(1)[0][0] if by_module else 1
    others = {module: rank for module, rank in by_module.items() if rank != common}
    repo, _, revision = base_name.partition("@")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=repo,
        revision=revision or None,
        inference_mode=True,
        r=common,
        lora_alpha=common,
        rank_pattern=others,
        alpha_pattern=others,
        target_modules=list(by_module),
        modules_to_save=plan.modules or None,
        bias="all" if plan.biases else "none",
        fan_in_fan_out=any(plan.places[name][0].transposed for name in plan.ranks),
        ensure_weight_tying=any(len(plan.places[name]) > 1 for name in plan.whole),
    )
    return {key: sorted(value) if isinstance(value, set) else value for key, value in sorted(config.to_dict().items())}


def _notes(plan: AdapterPlan) -> Iterator[str]:
    dtypes = {str(plan.result.checkpoint.tensors[name].spec.torch_dtype).removeprefix("torch.") for name in plan.ranks}
    if plan.parts is not None and dtypes - {"float32", "float64"}:
        yield f"the result is rounded to {' and '.join(sorted(dtypes))}, the experts' factors are not: the errors tell of that rounding"
    if plan.whole:
        yield f"{len(plan.whole)} tensors are no linear maps and are held whole: PEFT loads them, executors that take bare LoRA do not"
