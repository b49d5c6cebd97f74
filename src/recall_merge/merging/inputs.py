"""The models of a run, opened and checked against the base; weights are not read, except to tell one state of a model from another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from recall_merge.files.adapter import CONFIG, WEIGHTS, Adapter, changes_nothing, is_adapter, open_adapter
from recall_merge.files.checkpoint import Checkpoint, open_checkpoint
from recall_merge.files.experts import AdapterExpert, BaseExpert, Expert, FullExpert, hash_expert
from recall_merge.files.hashing import FileStates, same_weights
from recall_merge.files.hub import Located, Reference, cached_folder, locate, meaning
from recall_merge.files.same_architecture import check_checkpoint, named_like
from recall_merge.files.statistics import InputStatistics, check_base, open_statistics
from recall_merge.files.vocabulary import Vocabulary
from recall_merge.maths.methods import Method
from recall_merge.merging.run import ExpertEntry, MergeRun, skipped
from recall_merge.runtime.errors import CheckpointError, Faults


def locate_models(run: MergeRun, download: bool) -> tuple[dict[str, Located], Faults, FileStates]:
    """Where the models are, the faults of those that cannot be found, and the present state of all files that will be read."""
    faults, located = Faults(), {}
    for name, reference in {"base": run.base, **{entry.name: entry.path for entry in run.experts}}.items():
        with faults.collect():
            located[name] = locate(reference, weights=download)
    others = [entry.stats for entry in run.experts] + [run.samples.path if run.samples is not None else None]
    paths = [*(model.folder for model in located.values()), *(Path(path) for path in others if path is not None)]
    return located, faults, FileStates.of(paths)


def open_base(located: Located) -> Checkpoint:
    if is_adapter(located.folder):
        raise CheckpointError("the base is an adapter", where=located.folder, fix="give the model that the adapter was trained on")
    return open_checkpoint(located.folder, located.remote)


def open_expert(entry: ExpertEntry, located: Located, base: Checkpoint, run: MergeRun) -> Expert:
    """An expert that fits the base, or CheckpointError with every difference."""
    if is_adapter(located.folder):
        adapter = open_adapter(located.folder, base, located.remote)
        check_adapter_base(entry.name, adapter, base, run.base, entry.same_base)
        if changes_nothing(adapter):
            what = f"expert '{entry.name}' changes nothing: every product of its factors is zero"
            raise CheckpointError(what, where=adapter.folder / WEIGHTS, fix="train it, or leave it out")
        return AdapterExpert(entry.name, adapter)
    checkpoint = named_like(open_checkpoint(located.folder, located.remote), base)
    check_checkpoint(entry.name, checkpoint, base, lambda tensor: skipped(tensor, run.skip), is_base=entry.is_base)
    return BaseExpert(entry.name, checkpoint) if entry.is_base else FullExpert(entry.name, checkpoint)


def tokenizer_of(expert: Expert, base: Checkpoint, vocabulary: Vocabulary | None, speaker: Path) -> Any:
    """The tokenizer of the result, whose tokens all models share; where vocabularies differ, the expert's own."""
    from recall_merge.models.load import load_tokenizer

    return load_tokenizer(speaker if vocabulary is None else expert.folder, base.folder)


def check_adapter_base(expert: str, adapter: Adapter, base: Checkpoint, base_reference: str, same_base: bool) -> None:
    """Check that an adapter was trained on the run's base: its config names it, or a local model of the same weights; or the user does."""
    if same_base:
        return
    named, revision = adapter.config.get("base_model_name_or_path"), adapter.config.get("revision")
    where = adapter.folder / CONFIG
    fix = "set `same_base: true` on the expert (`recall learn`: --same-base) if it is the same model under another name"
    if not isinstance(named, str) or not named:
        raise CheckpointError(f"the adapter '{expert}' does not say which model it was trained on", where=where, fix=fix)
    theirs, ours = meaning(named, revision), meaning(base_reference)
    if theirs is not None and ours is not None and (theirs == ours or (isinstance(theirs, Reference) and theirs.covers(ours))):
        return
    folder = cached_folder(theirs) if isinstance(theirs, Reference) else theirs
    if folder is not None:
        with suppress(CheckpointError):  # a folder that is no model we could merge is not the base either
            if same_weights(open_checkpoint(folder), base):
                return
    what = f"the adapter '{expert}' was trained on '{named}', the run's base is '{base_reference}'"
    raise CheckpointError(what + ("" if folder else ", and the former is not here to be compared"), where=where, fix=fix)


def embedding_rows(expert: Expert, base: Checkpoint) -> int:
    """The number of tokens that an expert knows."""
    spec = expert.spec(base.embedding)
    return base.vocabulary_size if spec is None else spec.shape[0]


def check_distinct(run: MergeRun, located: Mapping[str, Located], faults: Faults) -> None:
    """No two experts may be the same folder."""
    owners: dict[Path, str] = {}
    for entry in run.experts:
        if entry.name not in located:
            continue
        folder = located[entry.name].folder.resolve()
        if folder in owners:
            faults.add(f"experts '{owners[folder]}' and '{entry.name}' are the same folder", where=folder, fix="list each expert once")
        owners.setdefault(folder, entry.name)


def read_statistics(
    run: MergeRun, experts: Sequence[Expert], base: Checkpoint, located: Mapping[str, Located], method: Method, faults: Faults
) -> tuple[tuple[InputStatistics | None, ...], list[str]]:
    """The input statistics of each expert, None where it has none; and notes on what they do not tell.

    Those of another state of an expert would mislead, and are refused; of weights that are still on the hub that cannot be told yet. So are
    those without the gradients that the method takes.
    """
    fix = "make them again with `recall stats`"
    statistics: list[InputStatistics | None] = []
    for expert, entry in zip(experts, run.experts, strict=True):
        stats = None
        with faults.collect():
            stats = open_statistics(Path(entry.stats) if entry.stats else expert.folder)
            if stats is None and entry.stats:
                raise CheckpointError("this folder has no input statistics", where=entry.stats, fix="make them with `recall stats`")
            if stats is not None and not located[entry.name].remote and stats.facts["expert"] != hash_expert(expert):
                what = f"the input statistics of expert '{expert.name}' were made for another state of it"
                raise CheckpointError(what, where=stats.folder, fix=fix)
            if stats is not None:
                check_base(stats, f"expert '{expert.name}'", base, known=not located["base"].remote)
            if stats is not None and method.gradients and not stats.has_gradients:
                what = f"the input statistics of expert '{expert.name}' hold no gradients, which `{method.name}` takes"
                raise CheckpointError(what, where=stats.folder, fix="make them again with `recall stats --gradients`")
        statistics.append(stats)
    return tuple(statistics), list(_thin(experts, statistics))


def _thin(experts: Sequence[Expert], statistics: Sequence[InputStatistics | None]) -> Iterator[str]:
    for expert, stats in zip(experts, statistics, strict=True):
        if stats is None:
            yield f"expert '{expert.name}' has no input statistics: all its inputs count alike"
            continue
        tokens, rank, (thin, mixed) = stats.facts["tokens"], stats.facts["rank"], stats.mixtures
        if tokens < rank:
            yield f"the input statistics of expert '{expert.name}' are of {tokens} tokens, fewer than their {rank} directions"
        if thin:
            what = f"{thin} of the {mixed} experts in the mixtures of '{expert.name}' read fewer than {rank} tokens in its input statistics"
            yield f"{what}: they share the mean of their block"
