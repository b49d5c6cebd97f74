"""The plan of a merge: all checks, from headers alone, and what the merge will do. All faults at once, nothing written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from recall_merge.files.checkpoint import Checkpoint
from recall_merge.files.companions import chat_template, ends, write_settings
from recall_merge.files.experts import AdapterExpert, BaseExpert, Expert, FullExpert
from recall_merge.files.hashing import FileStates
from recall_merge.files.hub import Located
from recall_merge.files.names import in_memory
from recall_merge.files.output import OutputFolder, Shard, free_bytes, plan_shards
from recall_merge.files.rows import Row, unread_columns
from recall_merge.files.safetensors import CODES, TensorSpec
from recall_merge.files.statistics import InputStatistics, has_statistics
from recall_merge.files.vocabulary import Vocabulary, plan_vocabulary, read_vocabulary
from recall_merge.merging.inputs import check_distinct, embedding_rows, locate_models, open_base, open_expert, read_statistics, tokenizer_of
from recall_merge.merging.placement import placement_notes, work_on
from recall_merge.merging.rules import GivenWeights, Override, Rules, choose_method, make_rules, overrides_of_tensors, weights_per_layer
from recall_merge.merging.run import MergeRun, RecallWeights, Samples, SampleWeights, skipped
from recall_merge.models.tokens import DATE, render_rows, writes_date
from recall_merge.runtime.device import find_device, hardware
from recall_merge.runtime.errors import CheckpointError, Faults, OutputError, RunError, did_you_mean
from recall_merge.runtime.parallel import cores
from recall_merge.runtime.paths import path_of
from recall_merge.runtime.sections import parse

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Plan(Rules):
    """A merge that has passed all checks that need no weights: the rules of a run, and the files that they apply to.

    Attributes:
        weights: one number per expert, summing to 1; one such row per layer; or how samples give them.
        overrides: weights and options that single tensors have of their own.
        speaker: the folder of the model whose chat template and end tokens the result has.
        rows: of the newest expert's data; empty where the run needs none.
        texts: those rows as the newest expert reads them; empty where the run compares none.
        specs: the result's tensors in the order of writing: by layer, then as in the base.
        statistics: one entry per expert, where the method uses them.
        device: where forward passes and heavy methods run.
        batch_tokens: padded tokens per batch of the forward passes; None for the processor's.
        notes: what a reader of the result should know.
        inputs: the state of all input files before they were first read.
    """

    run: MergeRun
    base: Checkpoint
    experts: tuple[Expert, ...]
    weights: GivenWeights | SampleWeights
    overrides: Mapping[str, Override]
    rows: list[Row]
    texts: list[str]
    vocabulary: Vocabulary | None
    speaker: Path
    specs: Mapping[str, TensorSpec]
    shards: list[Shard]
    located: Mapping[str, Located]
    device: torch.device
    batch_tokens: int | None = None
    statistics: tuple[InputStatistics | None, ...] = ()
    notes: list[str] = field(default_factory=list)
    inputs: FileStates = field(default_factory=lambda: FileStates({}), repr=False)

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

    @property
    def hardware(self) -> str:
        """What decides the bytes: the kind of accelerator that the merge uses, or the processor."""
        return hardware(self.device) if work_on(self.device, self.method, self.weights) else "cpu"

    @property
    def compared(self) -> list[Expert]:
        """The models whose hidden states are compared, newest last: the experts, and the base where the rule asks for it."""
        rule = self.weights
        asked = isinstance(rule, RecallWeights) and (
            rule.base_in_pool == "always" or (rule.base_in_pool == "single" and len(self.experts) == 1)
        )
        return [*([BaseExpert("base", self.base)] if asked else []), *self.experts]

    @property
    def single_pass(self) -> bool:
        """Whether a layer's weights are known as soon as its hidden states are, so that one pass weighs and merges."""
        return isinstance(self.weights, RecallWeights) and self.weights.ablation in ("none", "uniform")

    @cached_property
    def keeps_structure(self) -> bool:
        """Whether the result has the names, shapes, dtypes and vocabulary of the base."""
        return self.vocabulary is None and self.specs == self.base.specs

    @cached_property
    def bytes_read(self) -> int:
        """Bytes that the pass over the parameters reads of all models."""
        return self.base.nbytes + sum(expert.nbytes for expert in self.experts)

    @property
    def bytes_to_download(self) -> int:
        return sum(model.to_download for model in self.located.values())

    @cached_property
    def bytes_written(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    def merges(self, name: str) -> bool:
        """Whether a tensor is merged. `skip`, or a dtype other than floating point, keeps the base's."""
        return self.specs[name].is_float and not skipped(name, self.run.skip)

    def note(self, words: str) -> None:
        """Add a note that the work gives reason to, once."""
        if words not in self.notes:
            self.notes.append(words)

    def aligns(self, name: str) -> bool:
        """Whether the rows of a tensor are matched by token."""
        return self.vocabulary is not None and name in self.base.token_tensors

    def options_of(self, name: str) -> dict[str, Any]:
        """The method's options for one tensor."""
        return {**self.options, **(self.overrides[name].options if name in self.overrides else {})}

    @cached_property
    def names_of_layer(self) -> Mapping[int, list[str]]:
        """The result's tensors at each layer, in the order of writing."""
        names: defaultdict[int, list[str]] = defaultdict(list)
        for name in self.specs:
            names[self.base.layers.of(name)].append(name)
        return names


@contextmanager
def all_faults() -> Iterator[None]:
    """Where a run that is read in the block has unknown keys, plan what is left of it, so that all faults are told at once."""
    try:
        yield
    except RunError as error:
        if error.rest is None:
            raise
        faults = Faults()
        faults.extend(error.faults)
        faults.attempt(make_plan, error.rest, writes=error.rest.out.path is not None, download=False)
        raise RunError(faults) from None


def as_run(run: MergeRun | Mapping[str, Any]) -> MergeRun:
    """A run, given as it is or by its keys and values. Raises RunError with every fault."""
    if isinstance(run, MergeRun):
        return run
    if not isinstance(run, Mapping):
        raise RunError(f"a run is no {type(run).__name__}", fix="give a MergeRun, a mapping of its keys to values, or the path of its file")
    with all_faults():
        return parse(MergeRun, dict(run), where="the run")


def make_plan(run: MergeRun | Mapping[str, Any], *, writes: bool = True, download: bool = True) -> Plan:
    """Check a run against its files.

    Args:
        writes: a result is to be written, so check the place for it as well.
        download: fetch the weights of hub models too; False reads only their headers.

    Raises:
        RecallError: with every fault that can be found without reading weights.
    """
    run = as_run(run)
    faults, (located, not_located, inputs) = Faults(), locate_models(run, download)
    run, notes = _with_method(run, located)
    rules = faults.attempt(make_rules, run)
    rows = _read_rows(run, rules, faults)
    device = faults.attempt(find_device, run.device)
    faults.attempt(not_located.raise_any)
    base = faults.attempt(open_base, located["base"]) if "base" in located else None
    experts: list[Expert] = []
    if base is not None:
        check_distinct(run, located, faults)
        entries = [entry for entry in run.experts if entry.name in located]
        opened = [faults.attempt(open_expert, entry, located[entry.name], base, run) for entry in entries]
        experts = [expert for expert in opened if expert is not None]
    if writes:
        faults.attempt(_check_output, run, located)
    if base is None or rules is None or device is None or len(experts) < len(run.experts):
        faults.raise_any()
    assert base is not None and rules is not None and device is not None

    rule = rules.weights
    weights = rule if isinstance(rule, SampleWeights) else faults.attempt(weights_per_layer, rule, base.layers, "weights")
    overrides = faults.attempt(overrides_of_tensors, rules.parts, list(base.tensors), base.layers) or {}
    tokens = {expert.name: (expert.folder, embedding_rows(expert, base)) for expert in experts}
    planned = faults.attempt(plan_vocabulary, (base.folder, base.vocabulary_size), tokens, run.vocabulary)
    vocabulary, vocabulary_notes = planned or (None, [])
    speaker = faults.attempt(_speaker, run, base, experts, vocabulary) or base.folder
    compares = isinstance(rule, SampleWeights) and bool(rows)
    texts, date = (
        faults.attempt(_render, run, partial(tokenizer_of, experts[-1], base, vocabulary, speaker), rows) if compares else None
    ) or ([], [])
    _check_skip(run, [base, *(expert.source for expert in experts if isinstance(expert, FullExpert))], faults)
    _check_dtypes(run, base, experts, faults)
    specs = _result_specs(run, base, vocabulary, _kept_in_float32(run, base, experts))
    if isinstance(rule, SampleWeights):
        faults.attempt(_check_blocks, base)
    if writes:
        faults.attempt(_check_settings, run, base, experts, vocabulary, speaker, specs)
        faults.attempt(_check_space, run.out.path, specs)
    faults.raise_any()
    statistics, thin = read_statistics(run, experts, base, located, rules.method, faults) if rules.method.informed else ((), [])
    faults.raise_any()
    assert weights is not None
    notes += [*placement_notes(device, rules.method, rule), *vocabulary_notes, *unread_columns(rows), *_unheard(run, base, experts), *date]
    for expert in experts:
        if isinstance(expert, AdapterExpert) and base.is_tied and base.embedding in expert.source.edits:
            notes.append(f"expert '{expert.name}' trains the embedding, to which the head is tied: both change, as in PEFT's own merge")
    if base.layers.towers:
        root = base.layers.prefix.rpartition(".")[0]
        outside = [name for name in base.tensors if base.layers.of(name) == 0 and not name.startswith(f"{root}.")]
        notes += [f"{len(outside)} tensors outside the text model count as layer 0, its input: '{outside[0]}', ..."] if outside else []
    notes += thin
    return Plan(
        **{**vars(rules), "weights": weights},
        run=run,
        base=base,
        experts=tuple(experts),
        overrides=overrides,
        rows=rows,
        texts=texts,
        vocabulary=vocabulary,
        speaker=speaker,
        specs=specs,
        shards=plan_shards(specs, run.out.shard_size),
        located=located,
        device=device,
        statistics=statistics,
        notes=notes,
        inputs=inputs,
    )


def _with_method(run: MergeRun, located: Mapping[str, Located]) -> tuple[MergeRun, list[str]]:
    """The run with a method: its own, or the recommended one where it names none, with a note that says why."""
    if run.method is not None:
        return run, []
    statistics = [bool(entry.stats) or (entry.name in located and has_statistics(located[entry.name].folder)) for entry in run.experts]
    method, reason = choose_method(statistics, samples=run.samples is not None, weights=run.weights != "uniform")
    return run.model_copy(update={"method": method}), [f"`method` was left out: `{method}`, because {reason}"]


def _read_rows(run: MergeRun, rules: Rules | None, faults: Faults) -> list[Row]:
    if run.samples is not None:
        return faults.attempt(run.samples.read) or []
    if rules is not None and isinstance(rules.weights, SampleWeights):
        what = f"`samples` are missing: {rules.weights.compares} are compared on the newest expert's data"
        faults.add(what, fix="add `samples: {path: rows.jsonl}`")
    return []


def _render(run: MergeRun, load: Callable[[], Any], rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Rows as the newest expert reads them, and a note on the date that they hold."""
    assert run.samples is not None, "rows come from samples"
    tokenizer, template = load(), run.samples.template
    texts = ["".join(text) for text in render_rows(rows, tokenizer, template=template, where=run.samples.path)]
    note = f"the chat template writes the date of the day: here always {DATE:%d %b %Y}, so that the same run gives the same bytes"
    return texts, [note] if writes_date(tokenizer, template) else []


def _check_output(run: MergeRun, located: Mapping[str, Located]) -> None:
    if run.out.path is None:
        raise OutputError("the run does not say where the result goes", where="out", fix="add `out: {path: FOLDER}`, or give --out FOLDER")
    read = {f"the folder of {name}": model.folder for name, model in located.items()}
    read |= {f"the statistics of {entry.name}": path_of(entry.stats) for entry in run.experts if entry.stats}
    read |= {"the rows": path_of(run.samples.path)} if run.samples is not None else {}
    OutputFolder(run.out.path, overwrite=run.out.overwrite).check(read)


def _speaker(run: MergeRun, base: Checkpoint, experts: Sequence[Expert], vocabulary: Vocabulary | None) -> Path:
    """The folder of the model whose chat template and end tokens the result has: the run's choice, or the model whose tokens it has."""
    folders = {"base": base.folder, **{expert.name: expert.folder for expert in experts}, "newest": experts[-1].folder}
    choice, where = run.out.chat_template or ("newest" if run.vocabulary == "newest" else "base"), "out.chat_template"
    if choice not in folders:
        raise RunError(f"there is no expert '{choice}'", where=where, fix=did_you_mean(choice, folders))
    tokens = base.folder if vocabulary is None else vocabulary.tokenizer
    theirs = None if folders[choice] == tokens or vocabulary is None else read_vocabulary(folders[choice])
    if theirs is not None and (vocabulary is None or vocabulary.added or theirs != read_vocabulary(tokens)):
        what = f"the result does not have the tokens of '{choice}', for which its chat template and end tokens were made"
        raise RunError(what, where=where, fix="leave it out, or choose the same model's tokens with `vocabulary`")
    return folders[choice]


def _unheard(run: MergeRun, base: Checkpoint, experts: Sequence[Expert]) -> list[str]:
    """Notes on chat templates and end tokens of experts that the result does not get, where the run does not say whose it has."""
    notes, template, ours = [], chat_template(base.folder), ends(base.folder)
    for expert in experts if run.out.chat_template is None and run.vocabulary != "newest" else ():
        own, theirs = chat_template(expert.folder), ends(expert.folder)
        differ = ["chat template"] * (own not in (None, template)) + ["end tokens"] * any(theirs[key] != ours.get(key) for key in theirs)
        if differ:
            choice = f"`out.chat_template: {expert.name}` takes the expert's"
            notes.append(f"expert '{expert.name}' has its own {' and '.join(differ)}; the result has the base's: {choice}")
    return notes


def _check_skip(run: MergeRun, models: Sequence[Checkpoint], faults: Faults) -> None:
    for pattern in run.skip:
        if not any(skipped(name, [pattern]) for model in models for name in model.tensors):
            faults.add(f"`skip` names no tensor: '{pattern}'", fix="write a tensor's whole name, or a pattern such as '*.norm.weight'")


def _check_dtypes(run: MergeRun, base: Checkpoint, experts: Sequence[Expert], faults: Faults) -> None:
    """Where experts are stored in another dtype than the base, the user says which one the result has."""
    for expert in experts if run.out.dtype == "auto" else ():
        if isinstance(expert, FullExpert) and expert.source.dtypes != base.dtypes:
            theirs, ours = (" and ".join(sorted(dtypes)) for dtypes in (expert.source.dtypes, base.dtypes))
            what = f"expert '{expert.name}' is in {theirs}, the base in {ours}"
            faults.add(what, where=expert.folder, fix="say which dtype the result has, such as `dtype: bfloat16` under `out:`")


def _check_blocks(base: Checkpoint) -> None:
    """Models will be run: transformers can do that, block by block."""
    from recall_merge.models.architecture import check_blocks

    check_blocks(base.folder, base.layers)


def _check_settings(
    run: MergeRun,
    base: Checkpoint,
    experts: Sequence[Expert],
    vocabulary: Vocabulary | None,
    speaker: Path,
    specs: Mapping[str, TensorSpec],
) -> None:
    """Write what is read beside the result's weights into a folder that is then gone. Where the result will be loaded, so must that be."""
    loads = run.out.reload or vocabulary is not None or specs != base.specs
    if not loads and speaker == base.folder:  # the base's own files, as they are
        return
    with TemporaryDirectory() as place:
        write_settings(Path(place), base.folder, [expert.folder for expert in experts], vocabulary, None, speaker)
        if not loads:
            return
        from recall_merge.models.architecture import check_loads

        try:
            check_loads(Path(place))
        except CheckpointError as error:
            what = f"the result could not be loaded: {error.faults[0].what}"
            raise CheckpointError(what, where=speaker, fix="look at the configs there and in the base's folder") from error


def _check_space(path: Path | None, specs: Mapping[str, TensorSpec]) -> None:
    needed = sum(spec.nbytes for spec in specs.values())
    if path is not None and (free := free_bytes(path)) < needed:
        what = f"the result needs {needed:,} bytes of disk, {free:,} are free"
        raise OutputError(what, where=path, fix="make room, or choose another disk")


def _kept_in_float32(run: MergeRun, base: Checkpoint, experts: Sequence[Expert]) -> set[str]:
    """Tensors that the architecture keeps in float32 when the model is cast, such as the bias of a router."""
    sources = [base, *(expert.source for expert in experts if isinstance(expert, FullExpert))]
    if run.out.dtype in ("auto", "float32") or all(source.dtypes == {run.out.dtype} for source in sources):
        return set()
    model = in_memory(base.config, run.out.dtype)
    return set() if model is None else model.kept_wider(base.tensors)


def _result_specs(run: MergeRun, base: Checkpoint, vocabulary: Vocabulary | None, kept: Collection[str]) -> dict[str, TensorSpec]:
    specs: dict[str, TensorSpec] = {}
    for name in sorted(base.tensors, key=base.layers.of):  # a stable sort: within a layer, the base's own order
        spec = base.tensors[name].spec
        dtype = CODES["float32" if name in kept else run.out.dtype] if run.out.dtype != "auto" and spec.is_float else spec.dtype
        rows = (vocabulary.size,) if vocabulary is not None and name in base.token_tensors else spec.shape[:1]
        specs[name] = TensorSpec(dtype, (*rows, *spec.shape[1:]))
    return specs
