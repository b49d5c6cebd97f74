"""What a result adds to its base, as a LoRA adapter: where PEFT stores each changed tensor, the ranks, and the factors."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recall_merge.files.adapter import CONFIG, PREFIX, WEIGHTS
from recall_merge.files.checkpoint import Checkpoint
from recall_merge.files.experts import AdapterExpert
from recall_merge.files.names import Names
from recall_merge.files.output import OutputFolder, Shard, WeightWriter
from recall_merge.files.safetensors import TensorSpec
from recall_merge.maths.deltas import LowRank
from recall_merge.maths.low_rank import combined, squared_error, truncate
from recall_merge.merging.result import Result
from recall_merge.merging.unsound import keeps_numbers
from recall_merge.models.architecture import ParameterInfo, outline
from recall_merge.runtime.errors import Faults, ResultError
from recall_merge.runtime.progress import Progress


@dataclass(frozen=True)
class ExportedAdapter:
    """An adapter that was written. Errors are |delta - adapter| / |delta| in the Frobenius norm, with delta = result - base as stored."""

    path: Path
    error: float  # over the whole model
    errors: tuple[float, ...]  # by layer, 0..L+1; 0 where nothing changed
    ranks: Mapping[str, int]  # of every linear layer that it changes
    whole: tuple[str, ...]  # tensors that it stores whole, because they are not the weights of linear layers
    notes: tuple[str, ...]


@dataclass(frozen=True)
class AdapterPlan:
    """An adapter before its numbers are computed."""

    result: Result
    base: Checkpoint
    places: Mapping[str, Sequence[ParameterInfo]]  # tensor of the base -> its modules in memory; a tied embedding has two
    ranks: Mapping[str, int]  # of the changed weights of linear layers
    whole: tuple[str, ...]  # the other changed tensors
    experts: Sequence[AdapterExpert]  # the adapters that the result is a weighted sum of, if it is one
    shares: Tensor | None  # then the share of each expert at each layer (L + 2, k)

    @property
    def biases(self) -> list[str]:
        """Changed biases of linear layers, which PEFT stores beside the factors."""
        return [name for name in self.whole if self.places[name][0].is_linear and self.places[name][0].part == "bias"]

    @property
    def modules(self) -> list[str]:
        """Modules that are stored whole."""
        return [place.module for name in self.whole if name not in self.biases for place in self.places[name]]

    def whole_keys(self) -> dict[str, str]:
        """Key in the adapter's file -> tensor of the result, for everything that is stored whole."""
        factored = {self.places[name][0].module for name in self.ranks}
        keys = {}
        for name in self.biases:
            module = self.places[name][0].module
            keys[f"{PREFIX}{module}.{'base_layer.' if module in factored else ''}bias"] = name
        stored = set(self.modules)
        for name, places in self.places.items():  # also the parts of a module that did not change, which PEFT expects
            keys |= {f"{PREFIX}{place.module}.{place.part}": name for place in places if place.module in stored}
        return keys

    def specs(self) -> dict[str, TensorSpec]:
        """The adapter's file: the factors A (r, i) and B (o, r) of every linear layer, then everything that is stored whole."""
        specs = {}
        for name, rank in self.ranks.items():
            place, (o, i) = self.places[name][0], self.base.tensors[name].spec.shape
            o, i = (i, o) if place.transposed else (o, i)
            specs[f"{PREFIX}{place.module}.lora_A.weight"] = TensorSpec("F32", (rank, i))
            specs[f"{PREFIX}{place.module}.lora_B.weight"] = TensorSpec("F32", (o, rank))
        return specs | {key: self.result.checkpoint.tensors[name].spec for key, name in self.whole_keys().items()}


def plan_adapter(
    result: Result, base: Checkpoint, experts: Sequence[AdapterExpert], shares: Tensor | None, rank: int | None
) -> AdapterPlan:
    """Find where PEFT stores everything that changed, and the ranks.

    Raises:
        ResultError: with every changed tensor that an adapter cannot hold; or if nothing changed.
    """
    places, faults = _find_places(base), Faults()
    changed = [name for name in result.checkpoint.tensors if _changed(result, base, name)]
    own_folder = "use the result's own folder"
    if not changed:
        faults.add("the result equals its base: there is nothing to write", where=result.folder, fix="use the base")
    for name in changed:
        shape, base_shape = result.checkpoint.tensors[name].spec.shape, base.tensors[name].spec.shape
        if shape != base_shape:
            what = f"'{name}' has the shape {shape}, in the base {base_shape}; an adapter cannot change a shape"
            faults.add(what, where=result.folder, fix="merge with `vocabulary: base`")
        elif name not in places:
            what = f"'{name}' changed but is not a parameter of transformers' model; PEFT has no place for it"
            faults.add(what, where=result.folder, fix=own_folder)
    faults.raise_any(ResultError)
    linear = [name for name in changed if len(places[name]) == 1 and places[name][0].is_linear and places[name][0].part == "weight"]
    if not linear:
        raise ResultError("no linear layer changed, and a LoRA needs one", where=result.folder, fix=own_folder)
    ranks = {name: _rank(base.tensors[name].spec.shape, name, experts, rank) for name in linear}
    return AdapterPlan(result, base, places, ranks, tuple(name for name in changed if name not in ranks), experts, shares)


def write_adapter(target: Path, plan: AdapterPlan, base_name: str, progress: Progress) -> ExportedAdapter:
    """Write a planned adapter, whole or not at all; its config names the base `base_name`."""
    specs, layers = plan.specs(), plan.base.layers
    missed, sizes = [0.0] * (layers.last + 1), [0.0] * (layers.last + 1)
    bar = progress.stage("writing the adapter", sum(spec.nbytes for spec in specs.values()), "bytes")
    with OutputFolder(target, overwrite=False) as out:
        with bar as advance, WeightWriter(out.path, [Shard(WEIGHTS, specs)]) as writer:

            def add(key: str, tensor: Tensor) -> None:
                stored = tensor.to(specs[key].torch_dtype)
                if not keeps_numbers(tensor, stored):
                    what = f"the adapter overflows {specs[key].dtype} in '{key}'"
                    raise ResultError(what, where=plan.result.folder, fix="use the result's own folder")
                writer.add(key, stored)
                advance(specs[key].nbytes)

            for name in plan.ranks:
                place, delta, factors = plan.places[name][0], _delta(plan, name), _factors(plan, name)
                down, up = (factors.up.mT, factors.down.mT) if place.transposed else (factors.down, factors.up)
                add(f"{PREFIX}{place.module}.lora_A.weight", down.contiguous())
                add(f"{PREFIX}{place.module}.lora_B.weight", up.contiguous())
                part, size = squared_error(delta, factors)
                missed[layers.of(name)] += part
                sizes[layers.of(name)] += size
            for key, name in plan.whole_keys().items():
                add(key, plan.result.checkpoint.read(name))
        for name in plan.whole:
            sizes[layers.of(name)] += float(_delta(plan, name).square().sum())
        (out.path / CONFIG).write_text(json.dumps(_config(plan, base_name), indent=2) + "\n", "utf-8")
        out.commit()
    errors = tuple((part / size) ** 0.5 if size else 0.0 for part, size in zip(missed, sizes, strict=True))
    return ExportedAdapter(target, (sum(missed) / sum(sizes)) ** 0.5, errors, plan.ranks, plan.whole, tuple(_notes(plan)))


def _find_places(base: Checkpoint) -> dict[str, list[ParameterInfo]]:
    names, places = Names(base), {}
    for place in outline(base.folder):
        wanted = f"{place.module}.{place.part}"
        name = names.find(wanted) or (base.embedding if names.is_tied_head(wanted) else None)
        if name is not None:
            places.setdefault(name, []).append(place)
    return places


def _changed(result: Result, base: Checkpoint, name: str) -> bool:
    """Whether a tensor differs from the base's by more than its dtype."""
    old, new = base.tensors[name], result.checkpoint.tensors[name]
    if old.spec.shape != new.spec.shape or old.spec == new.spec:
        return not old.same_bytes(new)
    return not torch.equal(old.read().to(new.spec.torch_dtype), new.read())


def _rank(shape: tuple[int, ...], name: str, experts: Sequence[AdapterExpert], rank: int | None) -> int:
    """The given rank, or that of an exact adapter: the sum of the experts' ranks where all of them are nothing but factors."""
    edits = [edit for expert in experts if (edit := expert.source.edits.get(name)) is not None]
    downs = [edit.down for edit in edits if edit.is_product]
    exact = sum(down.spec.shape[0] for down in downs if down is not None) if edits and len(downs) == len(edits) else min(shape)
    return min(rank or exact, *shape)


def _delta(plan: AdapterPlan, name: str) -> Tensor:
    return plan.result.checkpoint.read(name).double() - plan.base.read(name).double()


def _factors(plan: AdapterPlan, name: str) -> LowRank:
    """The factors of one linear layer, in the base's orientation."""
    rank = plan.ranks[name]
    if plan.shares is not None:
        base = plan.base.read(name).double()
        shares = plan.shares[plan.base.layers.of(name)].tolist()
        deltas = [expert.delta(name, base) for expert in plan.experts]
        pairs = [(delta, share) for delta, share in zip(deltas, shares, strict=True) if delta is not None]
        together = combined([delta for delta, _ in pairs], [share for _, share in pairs])
        if isinstance(together, LowRank):
            return together if together.rank == rank else truncate(together, rank)
    return truncate(_delta(plan, name), rank)


def _config(plan: AdapterPlan, base_name: str) -> dict[str, Any]:
    """PEFT's config. Modules are given by their full names; where ranks differ, patterns give them, with alpha = r everywhere."""
    from peft import LoraConfig

    by_module = {plan.places[name][0].module: rank for name, rank in plan.ranks.items()}
    common = Counter(by_module.values()).most_common(1)[0][0]
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
    if plan.shares is not None and dtypes - {"float32", "float64"}:
        yield f"the result is rounded to {' and '.join(sorted(dtypes))}, the experts' factors are not: the errors show this rounding"
    if plan.whole:
        yield f"{len(plan.whole)} tensors are stored whole: PEFT loads them, inference engines that take only LoRA factors do not"
