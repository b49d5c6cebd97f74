"""The plan of a merge: everything that it will check and do, from headers alone. All faults at once, nothing written."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recall_merge.files.adapter import check_adapter_base, is_adapter, open_adapter
from recall_merge.files.checkpoint import Checkpoint, open_checkpoint
from recall_merge.files.experts import AdapterExpert, BaseExpert, Expert, FullExpert, check_checkpoint, hash_expert
from recall_merge.files.hashing import Watch, watch
from recall_merge.files.hub import Located, locate
from recall_merge.files.names import named_like
from recall_merge.files.output import OutputFolder, Shard, free_bytes, plan_shards
from recall_merge.files.rows import Row, read_rows
from recall_merge.files.safetensors import CODES, Spec
from recall_merge.files.statistics import InputStatistics, has_statistics, open_statistics
from recall_merge.files.vocabulary import Vocabulary, plan_vocabulary
from recall_merge.merging.rules import GivenWeights, Own, Rules, choose_method, rules_of
from recall_merge.merging.run import ExpertEntry, FromSamples, Losses, MergeRun, RecallWeights, Samples
from recall_merge.runtime.errors import CheckpointError, Faults, OutputError
from recall_merge.runtime.parallel import cores

if TYPE_CHECKING:
    from recall_merge.maths.methods import Method
    from recall_merge.merging.weights import MergeWeights

SPAN = 1 << 19
"""Numbers in one unit of work. A multiple of what a processor's vectors hold, so that pieces are rounded as the whole tensor is."""
WHOLE = 1 << 22
"""Numbers of a tensor from which a look at deltas before the merge, and reading them again for it, is better than to hold them whole."""
CHARACTERS_PER_TOKEN = 4  # of English prose under byte-level tokenizers


@dataclass(frozen=True)
class Plan:
    """A merge that has passed all checks which need no weights."""

    run: MergeRun
    base: Checkpoint
    experts: tuple[Expert, ...]
    method: Method
    options: Mapping[str, Any]
    weights: GivenWeights | FromSamples
    """One number an expert, summing to 1; or such a row for each layer; or how representations give them."""
    rows: list[Row]
    vocabulary: Vocabulary | None
    specs: Mapping[str, Spec]
    """The result's tensors in the order of writing: by layer, then as in the base."""
    shards: list[Shard]
    located: Mapping[str, Located]
    statistics: tuple[InputStatistics | None, ...] = ()
    """Of each expert; read only if the method wants them."""
    notes: list[str] = field(default_factory=list)
    own: Mapping[str, Own] = field(default_factory=dict)
    """Weights and options that tensors have of their own, by their names."""
    inputs: Watch = field(default_factory=lambda: Watch({}), repr=False)
    """All that is read, as it was before the first look at it."""

    @property
    def samples(self) -> Samples:
        assert self.run.samples is not None
        return self.run.samples

    @property
    def target(self) -> Path:
        """The folder of the result."""
        assert self.run.out.path is not None
        return self.run.out.path

    @property
    def threads(self) -> int:
        return self.run.threads or cores()

    def merges(self, name: str) -> bool:
        """Whether a tensor is merged, or kept from the base: by `skip`, or because it does not hold floating-point numbers."""
        return self.specs[name].is_float and not skipped(name, self.run.skip)

    def weights_of(self, name: str, by_layer: MergeWeights) -> list[float]:
        """The experts' weights in one tensor: its own, or those of its layer."""
        own = self.own[name].weights if name in self.own else None
        return by_layer.of_experts(self.base.layers.of(name)) if own is None else list(own)

    def options_of(self, name: str) -> dict[str, Any]:
        """The method's options in one tensor."""
        return {**self.options, **(self.own[name].options if name in self.own else {})}

    def aligns(self, name: str) -> bool:
        """Whether the rows of a tensor are matched by token."""
        return self.vocabulary is not None and name in self.base.token_tensors

    def needs_thresholds(self, name: str) -> bool:
        """Whether the method looks at the deltas of a tensor before it merges their numbers one by one."""
        return self.method.find_threshold is not None and self.merges(name)

    def in_spans(self, name: str) -> bool:
        """Whether a tensor is merged one span of numbers after another: it is large, and may be."""
        if self.specs[name].numel <= (WHOLE if self.needs_thresholds(name) else SPAN):
            return False
        alone = self.method.in_spans(self.options_of(name)) and self.run.prune is None and not self.aligns(name)
        return (alone or not self.merges(name)) and all(expert.comes_in_pieces(name) for expert in self.experts)

    @property
    def by_layer(self) -> bool:
        """Whether one pass over the models, layer by layer, weighs and merges them: each layer's weights come from what lies before."""
        return isinstance(self.weights, RecallWeights) and self.weights.ablation in ("none", "uniform")

    @property
    def passes(self) -> str:
        """How often the models are read, and why."""
        if not isinstance(self.weights, FromSamples):
            return "one pass over all models" + (f", tensors of more than {WHOLE:,} numbers twice" if self.method.find_threshold else "")
        newest = f"'{self.experts[-1].name}' once for the typical samples"
        if self.by_layer:
            return f"{newest}, then one pass over all models, layer by layer"
        why = "losses are known at the end of a model" if isinstance(self.weights, Losses) else "the ablation needs all layers"
        return f"{newest}, all models whole for the weights ({why}), then one pass over all models"

    @cached_property
    def bytes_read(self) -> int:
        """Of the models, by the pass over the parameters."""
        return self.base.nbytes + sum(expert.nbytes for expert in self.experts)

    @property
    def bytes_to_download(self) -> int:
        """Of hub models, by a merge."""
        return sum(place.to_download for place in self.located.values())

    @cached_property
    def bytes_written(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    @cached_property
    def memory(self) -> int:
        """Bytes of memory at most, beside the interpreter's own: the largest of what the parts of the work hold, one after another.

        Layer by layer, the pass over the parameters also holds the block of base and experts, and once more of the one that runs, and the
        hidden states of the pool or of every model's samples. The check of the result maps its files: the system may take that memory back.
        """
        merging_tensors = self.memory_to_merge
        if self.by_layer:
            merging_tensors += self._block * (len(self.experts) + 2) + self._states(len(self.experts) + 1)
        elif isinstance(self.weights, FromSamples):
            merging_tensors = max(merging_tensors, self.memory_to_run)
        return merging_tensors

    @cached_property
    def memory_to_merge(self) -> int:
        """Bytes of the pass over the parameters: for each thread one tensor (or one span of it, where the method allows that) of base,
        experts and result in float32, and finished ones that wait for their turn."""
        held_at_once = [SPAN if self.in_spans(name) else spec.numel for name, spec in self.specs.items()]
        held = len(self.experts) + 3 + (len(self.experts) + 1 if self.run.prune is not None else 0)
        return 4 * (held + 1) * sum(sorted(held_at_once)[-self.threads :])

    @property
    def memory_to_walk(self) -> int:
        """Bytes of one model's forward pass block by block: a block as it is read and as it runs, and the hidden states."""
        return 2 * self._block + self._states(1)

    @property
    def memory_to_run(self) -> int:
        """Bytes of one model's forward pass as a whole: the model, twice for a moment while it is built."""
        return 2 * self._width * sum(spec.numel for spec in self.specs.values())

    @property
    def _width(self) -> int:
        """Bytes of a number in a forward pass."""
        return 2 if isinstance(self.weights, RecallWeights) and self.weights.precision == "bfloat16" else 4

    @property
    def _block(self) -> int:
        """Bytes of the largest block in float32; tables of tokens are never held."""
        layers = self.base.layers
        sizes = [0] * (layers.last + 1)
        for name, spec in self.specs.items():
            if name not in self.base.token_tensors:
                sizes[layers.of(name)] += 4 * spec.numel
        return max(sizes)

    def _states(self, models: int) -> int:
        """Bytes of the hidden states that wait at a layer, with a few times as many at work in a block; from the rows' characters."""
        lengths = [min(self.samples.max_tokens, len(row.plain + row.completion) // CHARACTERS_PER_TOKEN + 1) for row in self.rows]
        pool = sum(sorted(lengths)[-self.samples.pool :])
        samples = sum(sorted(lengths)[-self.samples.count :]) * models
        return 4 * self._width * max(pool, samples) * self.base.tensors[self.base.embedding].spec.shape[-1]


def make_plan(run: MergeRun, *, writes: bool = True, download: bool = True) -> Plan:
    """Check a run against its files.

    Args:
        writes: a result is to be written, so the place for it is checked as well.
        download: fetch the weights of hub models too; False reads only their headers.

    Raises:
        RecallError: with every fault that can be found without reading weights.
    """
    faults, (located, lost, inputs) = Faults(), _locate(run, download)
    run, notes = _with_method(run, located)
    rules: Rules | None = None
    with faults.collect():
        rules = rules_of(run)
    rows: list[Row] = []
    if run.samples is not None:
        with faults.collect():
            rows = read_rows(run.samples.path, split=run.samples.split)
    elif rules is not None and isinstance(rules.weights, FromSamples):
        faults.add(_without_samples(rules.weights), fix="add `samples: {path: rows.jsonl}`")

    with faults.collect():
        lost.raise_any()
    base: Checkpoint | None = None
    experts: list[Expert] = []
    if "base" in located:
        with faults.collect():
            base = _open_base(located["base"])
    if base is not None:
        _same_folder_twice(run, located, faults)
        for entry in run.experts:
            if entry.name in located:
                with faults.collect():
                    experts.append(_open_expert(entry, located[entry.name], base, run))
    if writes:
        with faults.collect():
            _check_output(run, located)
    if base is None or rules is None or len(experts) < len(run.experts):
        faults.raise_any()
    assert base is not None and rules is not None

    vocabulary, told = None, []
    with faults.collect():
        rules = rules.of_model(base.layers, list(base.tensors))
    with faults.collect():
        vocabulary, told = plan_vocabulary(
            (base.folder, base.vocabulary_size), {e.name: _tokens_of(e, base) for e in experts}, run.vocabulary
        )
    _check_skip(run, (base, *experts), faults)
    if run.out.dtype == "auto":
        for expert in experts:
            if isinstance(expert, FullExpert) and expert.checkpoint.dtypes != base.dtypes:
                what = f"expert '{expert.name}' is in {_words(expert.checkpoint.dtypes)}, the base in {_words(base.dtypes)}"
                faults.add(what, where=expert.folder, fix="say what the result shall be, e.g. `dtype: bfloat16` under `out:`")
    specs = _result_specs(run, base, vocabulary)
    if writes and run.out.path is not None:
        with faults.collect():
            _check_space(run.out.path, sum(spec.nbytes for spec in specs.values()))
    faults.raise_any()
    notes += [*told, *(note for expert in experts for note in _adapter_notes(expert, base))]
    statistics = _statistics(rules.method, base, experts, run, located, faults)
    notes += [
        f"expert '{e.name}' has no input statistics: all its inputs count alike"
        for e, stats in zip(experts, statistics, strict=False)
        if stats is None
    ]
    faults.raise_any()
    shards = plan_shards(specs, run.out.shard_size)
    return Plan(
        run,
        base,
        tuple(experts),
        rules.method,
        rules.options,
        rules.resolved,
        rows,
        vocabulary,
        specs,
        shards,
        located,
        statistics,
        notes,
        rules.own,
        inputs,
    )


def _without_samples(rule: FromSamples) -> str:
    return f"`samples` are missing: {rule.compares} are compared on the newest expert's data"


def _locate(run: MergeRun, download: bool) -> tuple[dict[str, Located], Faults, Watch]:
    """Where the models are, what is wrong with those that are nowhere, and how all that will be read is now."""
    faults, located = Faults(), {}
    for name, reference in {"base": run.base, **{entry.name: entry.path for entry in run.experts}}.items():
        with faults.collect():
            located[name] = locate(reference, weights=download)
    single = [entry.stats for entry in run.experts] + [run.samples.path if run.samples is not None else None]
    return located, faults, watch([*(place.folder for place in located.values()), *(Path(place) for place in single if place is not None)])


def _with_method(run: MergeRun, located: Mapping[str, Located]) -> tuple[MergeRun, list[str]]:
    """The run with a method: its own, or the one that is recommended where it names none, and a note on why."""
    if run.method is not None:
        return run, []
    statistics = [bool(entry.stats) or (entry.name in located and has_statistics(located[entry.name].folder)) for entry in run.experts]
    method, reason = choose_method(statistics, samples=run.samples is not None, weights=run.weights != "uniform")
    return run.model_copy(update={"method": method}), [f"`method` was left out: `{method}`, because {reason}"]


def skipped(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _open_base(place: Located) -> Checkpoint:
    if is_adapter(place.folder):
        raise CheckpointError("the base is an adapter", where=place.folder, fix="give the model that the adapter was trained on")
    return open_checkpoint(place.folder, place.remote)


def _open_expert(entry: ExpertEntry, place: Located, base: Checkpoint, run: MergeRun) -> Expert:
    name = entry.name
    if is_adapter(place.folder):
        adapter = open_adapter(place.folder, base, place.remote)
        check_adapter_base(name, adapter, base, run.base, entry.same_base)
        return AdapterExpert(name, adapter)
    checkpoint = named_like(open_checkpoint(place.folder, place.remote), base)
    check_checkpoint(name, checkpoint, base, lambda tensor: skipped(tensor, run.skip), is_base=entry.is_base)
    return BaseExpert(checkpoint, name) if entry.is_base else FullExpert(name, checkpoint)


def _check_output(run: MergeRun, located: Mapping[str, Located]) -> None:
    if run.out.path is None:
        raise OutputError("the run does not say where the result goes", where="out", fix="add `out: {path: FOLDER}`, or give --out FOLDER")
    OutputFolder(run.out.path, overwrite=run.out.overwrite).check(
        {f"the folder of {name}": place.folder for name, place in located.items()}
    )


def _check_skip(run: MergeRun, models: Sequence[Checkpoint | Expert], faults: Faults) -> None:
    for pattern in run.skip:
        if not any(skipped(name, [pattern]) for model in models for name in model.tensors):
            faults.add(f"`skip` names no tensor: '{pattern}'", fix="write a tensor's whole name, or a pattern such as '*.norm.weight'")


def _check_space(path: Path, needed: int) -> None:
    if (free := free_bytes(path)) < needed:
        what = f"the result needs {needed:,} bytes of disk, {free:,} are free"
        raise OutputError(what, where=path, fix="make room, or choose another disk")


def _same_folder_twice(run: MergeRun, located: Mapping[str, Located], faults: Faults) -> None:
    seen: dict[Any, str] = {}
    for entry in run.experts:
        if entry.name not in located:
            continue
        folder = located[entry.name].folder.resolve()
        if folder in seen:
            faults.add(f"experts '{seen[folder]}' and '{entry.name}' are the same folder", where=folder, fix="list each expert once")
        seen.setdefault(folder, entry.name)


def _tokens_of(expert: Expert, base: Checkpoint) -> Any:
    """An expert's folder, and the rows of its embedding."""
    spec = expert.spec(base.embedding)
    return expert.folder, spec.shape[0] if spec is not None else base.vocabulary_size


def _result_specs(run: MergeRun, base: Checkpoint, vocabulary: Vocabulary | None) -> dict[str, Spec]:
    specs: dict[str, Spec] = {}
    for name in sorted(base.tensors, key=base.layers.of):  # a stable sort: within a layer, the base's own order
        spec = base.tensors[name].spec
        dtype = CODES[run.out.dtype] if run.out.dtype != "auto" and spec.is_float else spec.dtype
        rows = (vocabulary.size,) if vocabulary is not None and name in base.token_tensors else spec.shape[:1]
        specs[name] = Spec(dtype, (*rows, *spec.shape[1:]))
    return specs


def _adapter_notes(expert: Expert, base: Checkpoint) -> list[str]:
    if not isinstance(expert, AdapterExpert) or not base.is_tied:
        return []
    edit = expert.adapter.edits.get(base.embedding)
    return [f"expert '{expert.name}' trains the embedding, to which the head is tied: both change, as in PEFT's own merge"] if edit else []


def _statistics(
    method: Method, base: Checkpoint, experts: Sequence[Expert], run: MergeRun, located: Mapping[str, Located], faults: Faults
) -> tuple[InputStatistics | None, ...]:
    """The experts' statistics, where the method wants them. Input statistics of another state of its expert would mislead, so it is refused
    (once the weights are here: their headers do not tell)."""
    if not method.informed:
        return ()
    statistics: list[InputStatistics | None] = []
    for expert, entry in zip(experts, run.experts, strict=True):
        stats = None
        with faults.collect():
            stats = open_statistics(Path(entry.stats) if entry.stats else expert.folder)
            if stats is None and entry.stats:
                raise CheckpointError("there is no input statistics in this folder", where=entry.stats, fix="make it with `recall stats`")
            if stats is not None and not located[entry.name].remote and stats.facts["expert"] != hash_expert(expert):
                what = f"the input statistics of expert '{expert.name}' was made for another state of it"
                raise CheckpointError(what, where=stats.folder, fix="make it again with `recall stats`")
            if stats is not None and (misfits := stats.misfits(base.specs)):
                what = f"the input statistics of expert '{expert.name}' tells of other inputs of '{misfits[0]}' than it has"
                raise CheckpointError(what, where=stats.folder, fix="make it again with `recall stats`")
        statistics.append(stats)
    return tuple(statistics)


def _words(dtypes: set[str]) -> str:
    return " and ".join(sorted(dtypes))
