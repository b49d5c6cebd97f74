"""Several merges of the same experts on the same validation rows: which is best, and is that sure?

Bad candidates stop early, by successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943): all are scored on a sixteenth of the
rows, a quarter of them on a quarter, the two best on all. Every difference is paired, over rows that both were scored on. Of candidates
that are level with the best on all rows, the simplest is chosen.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from recall_merge.evaluation.scores import check_lengths, score_tasks
from recall_merge.evaluation.tasks import TaskSpec, check_metrics, check_tasks, task_word
from recall_merge.files.companions import write_companions
from recall_merge.files.hashing import ModelDigest
from recall_merge.files.row_sources import RowSource, read_template
from recall_merge.files.rows import Row
from recall_merge.maths.bootstrap import Interval, bootstrap
from recall_merge.maths.methods import ALIASES
from recall_merge.merging.layerwise import compute_weights
from recall_merge.merging.plan import Plan, make_plan
from recall_merge.merging.rules import WEIGHT_OPTIONS, find_method
from recall_merge.merging.run import MergeRun, RecallWeights
from recall_merge.merging.samples import TypicalSamples
from recall_merge.merging.tensors import TensorCollector, merge_tensors
from recall_merge.merging.weights import MergeWeights, weights_from_similarity
from recall_merge.models.load import build_model, load_tokenizer, placed
from recall_merge.runtime.errors import DataError, Faults, MissingExtra, RunError, did_you_mean
from recall_merge.runtime.notebook import html_table, shaded
from recall_merge.runtime.progress import Progress, Silent
from recall_merge.runtime.sections import assign, parse

SHARES = (1 / 16, 1 / 4)  # of the rows, in the rounds before the last
LEFT = 4  # of so many candidates one goes on
FINALISTS = 2
LEAST = 8  # rows of a task in any round
AFTER_SIMILARITY = {"temperature", "ablation", "outside_blocks"}  # keys of RECALL's weights that hidden states do not depend on


@dataclass
class Candidate:
    """One way to merge, and what is known of it so far."""

    name: str
    plan: Plan = field(repr=False)
    changed: int  # options that are not the default
    items: dict[str, dict[int, float]] = field(default_factory=dict, repr=False)  # by task and row, the score
    merge_seconds: float = 0.0
    score_seconds: float = 0.0

    @property
    def rows(self) -> int:
        """On how many rows it was scored."""
        return sum(map(len, self.items.values()))

    @property
    def scores(self) -> dict[str, float]:
        """By task, the mean over rows."""
        return {task: sum(items.values()) / len(items) for task, items in self.items.items()}

    @property
    def score(self) -> float:
        """The mean over tasks."""
        return sum(self.scores.values()) / len(self.scores)

    @property
    def needs(self) -> tuple[bool, bool, int]:
        """What it takes: rows or statistics; more work than reading; options. The least is the simplest."""
        method = self.plan.method
        informed = method.informed or not isinstance(self.plan.weights, tuple)
        return informed, method.heavy, self.changed


@dataclass(frozen=True)
class Comparison:
    """Candidates from the best to the worst: the finalists, then the others by the round that they left in."""

    candidates: tuple[Candidate, ...]
    finalists: int

    @cached_property
    def _behind(self) -> dict[str, Interval]:
        return {each.name: _difference(each, self.candidates[0]) for each in self.candidates}

    @property
    def chosen(self) -> Candidate:
        """The simplest of the finalists that are level with the best."""
        return min(filter(self.is_level, self.candidates[: self.finalists]), key=lambda each: each.needs)

    def behind(self, candidate: Candidate) -> Interval:
        """Its score minus that of the best, on the rows that both were scored on, with a 95 % interval."""
        return self._behind[candidate.name]

    @property
    def head(self) -> list[str]:
        """Of `lines`."""
        names = [*self.candidates[0].scores]
        return ["merge", "rows", "mean", *(names if len(names) > 1 else []), "behind the best", "", "merging", "scoring"]

    def lines(self) -> Iterator[list[str]]:
        """What is known of each candidate, in words, the best first."""
        for number, candidate in enumerate(self.candidates):
            behind = self.behind(candidate)
            gap = f"{behind.estimate:+.3f} [{behind.low:+.3f}, {behind.high:+.3f}]" if number else "-"
            word = ("level" if self.is_level(candidate) else "worse") if number else ""
            word += ", left early" if number >= self.finalists else ""
            scores = [f"{score:.3f}" for score in candidate.scores.values()] if len(candidate.scores) > 1 else []
            seconds = [f"{candidate.merge_seconds:.1f} s", f"{candidate.score_seconds:.1f} s"]
            yield [candidate.name, str(candidate.rows), f"{candidate.score:.3f}", *scores, gap, word, *seconds]

    def _repr_html_(self) -> str:
        means = shaded([candidate.score for candidate in self.candidates])
        rows = ([*line[:2], mean, *line[3:]] for mean, line in zip(means, self.lines(), strict=True))
        return html_table(f"chosen: {self.chosen.name}", self.head, rows)

    def is_level(self, candidate: Candidate) -> bool:
        """Whether it cannot be told from the best on its rows."""
        return not self.behind(candidate).high < 0


def compare(
    run: MergeRun,
    tasks: Sequence[str],
    *,
    methods: Sequence[str] = (),
    grid: Mapping[str, Sequence[Any]] | None = None,
    metrics: Mapping[str, str] | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    template: bool | str | Path = True,
    progress: Progress | None = None,
) -> Comparison:
    """Merge the experts of a run in several ways, in memory, and score them; nothing is written. What stands at the run's `out` is checked.

    Args:
        tasks: validation rows, ROWS or NAME=ROWS. A row counts by its own score, so chrF and BLEU are means over rows here.
        methods: by default all that the run has what it takes for, of those that are worth a try without tuning.
        grid: option of a method, or dotted key of the run -> values to try, in all combinations. Methods without that option come once.
        limit: only the first rows of each task.

    Raises:
        RecallError: with every fault of every candidate and of the rows, before any work.
    """
    if find_spec("lm_eval") is None:
        raise MissingExtra("eval", "scoring")
    progress, faults = progress or Silent(), Faults()
    template = faults.attempt(read_template, template) or False
    specs = _read_tasks(tasks, metrics or {}, limit, faults)
    faults.extend(check_tasks(specs))
    candidates = list(_candidates(run, methods, grid or {}, faults))
    _check_overlap(run, specs, faults)
    faults.raise_any(RunError)
    check_lengths(candidates[0].plan.base.folder, specs, template=template).raise_any(DataError)
    order = {spec.name: _shuffled(spec.rows or (), run.seed) for spec in specs}
    weights = _Weights(progress)
    left: list[Candidate] = []
    for number, share in rounds(len(candidates), min(map(len, order.values()))):
        ranked = _ranked(candidates)
        candidates, left = ranked[:number], ranked[number:] + left
        with progress.stage(f"comparing {number} merges", number, "merges") as advance:
            for candidate in candidates:
                rest = [_further(spec, candidate, order[spec.name], share) for spec in specs]
                if any(spec.rows for spec in rest):
                    _score(candidate, [spec for spec in rest if spec.rows], weights, batch_size=batch_size, template=template)
                advance(1)
    finalists = _ranked(candidates)
    return Comparison((*finalists, *left), len(finalists))


def rounds(candidates: int, rows: int) -> Iterator[tuple[int, float]]:
    """How many candidates are scored on which share of the rows, round by round.

    >>> [*rounds(12, 320)], [*rounds(12, 20)], [*rounds(2, 320)]
    ([(12, 0.0625), (3, 0.25), (2, 1.0)], [(12, 0.4), (2, 1.0)], [(2, 1.0)])
    """
    last = 0.0
    for share in (max(share, LEAST / max(rows, 1)) for share in SHARES):
        if candidates > FINALISTS and last < share < 1:
            yield candidates, share
            candidates, last = max(FINALISTS, -(-candidates // LEFT)), share
    yield min(candidates, FINALISTS) if last else candidates, 1.0


def _candidates(run: MergeRun, methods: Sequence[str], grid: Mapping[str, Sequence[Any]], faults: Faults) -> Iterator[Candidate]:
    """Every method with every combination of the options that it has. What is wrong with any is added to the faults."""
    with faults.collect():
        chosen = list(methods) or [*_worth_a_try(run)]
        chosen = [name for name in dict.fromkeys(chosen) if faults.attempt(find_method, name, where="--methods") is not None]
        for key, values in grid.items():
            if not values:
                faults.add(f"'{key}' has no values to try", where="--set-grid", fix="write KEY=V,V,..")
            if "." not in key and not any(key in _options(name) for name in chosen):
                known = {option for name in chosen for option in _options(name)}
                faults.add(f"none of these methods has an option '{key}'", where="--set-grid", fix=did_you_mean(key, known))
        for name in chosen:
            keys = [key for key in grid if "." in key or key in _options(name)]
            for values in itertools.product(*(grid[key] for key in keys)):
                with faults.collect():
                    yield _candidate(run, name, dict(zip(keys, values, strict=True)))


def _candidate(run: MergeRun, name: str, values: Mapping[str, Any]) -> Candidate:
    data = run.model_dump(mode="json", exclude_unset=True)
    if run.method != name:
        data |= {"method": name, "options": {}}
    if name in ALIASES:
        data.pop("weights", None)
    for key, value in values.items():
        assign(data, key if "." in key else f"options.{key}", value)
    label = ", ".join([name, *(f"{key} {value}" for key, value in values.items())])
    plan = make_plan(parse(MergeRun, data, where=label), writes=run.out.path is not None)
    changed = sum(value != plan.method.options[key].default for key, value in plan.options.items()) + sum("." in key for key in values)
    return Candidate(label, plan, changed)


def _worth_a_try(run: MergeRun) -> Iterator[str]:
    """Methods that need no tuning, as far as the run has what they take; the run's own first."""
    if run.method is not None:
        yield run.method
    plan = make_plan(run.model_copy(update={"method": None, "options": {}}), writes=False)
    if plan.method.informed:
        yield plan.name
    if len(run.experts) > 1:
        yield from ("linear", "ties", "tsv", "null_space")
    if run.samples is not None:
        yield "recall"


def _options(name: str) -> Collection[str]:
    return {*find_method(name).options, *(WEIGHT_OPTIONS[ALIASES[name].weights].model_fields if name in ALIASES else ())}


def _read_tasks(words: Sequence[str], metrics: Mapping[str, str], limit: int | None, faults: Faults) -> list[TaskSpec]:
    specs = []
    for word in words:
        name, file = task_word(word)
        with faults.collect():
            if file is None:
                raise RunError(f"'{word}' is no file of rows", where="--tasks", fix="give validation rows: FILE, or NAME=FILE")
            specs.append(TaskSpec(name, RowSource.of(file, "validation").read()[:limit], metrics.get(name)))
    if not words:
        faults.add("there is no task", fix="give --tasks FILE,NAME=FILE")
    faults.extend(check_metrics(metrics, [task_word(word)[0] for word in words]))
    return specs


def _check_overlap(run: MergeRun, specs: Sequence[TaskSpec], faults: Faults) -> None:
    """No validation row may be one of the newest expert's rows: an expert knows what it was trained on."""
    if run.samples is None:
        return
    with faults.collect():
        trained = {row.content for row in run.samples.read()}
        for spec in specs:
            if shared := sum(row.content in trained for row in spec.rows or ()):
                what = f"{shared} of the {len(spec.rows or ())} validation rows of '{spec.name}' are also among the run's samples"
                faults.add(what, where="--tasks", fix="give rows that no expert was trained on")


def _shuffled(rows: Sequence[Row], seed: int) -> list[Row]:
    """Rows in an order that the seed decides, so that the first of them stand for all."""
    return [rows[at] for at in np.random.Generator(np.random.Philox(key=seed)).permutation(len(rows))]


def _further(spec: TaskSpec, candidate: Candidate, rows: Sequence[Row], share: float) -> TaskSpec:
    """The rows of this round that the candidate was not scored on before."""
    known = candidate.items.get(spec.name, {})
    return replace(spec, rows=[row for row in rows[: max(1, round(share * len(rows)))] if row.index not in known])


def _score(candidate: Candidate, specs: Sequence[TaskSpec], weights: _Weights, **options: Any) -> None:
    """Merge, and add the scores of these rows to what is known."""
    start, plan = time.monotonic(), candidate.plan
    collector = TensorCollector(plan)
    merge_tensors(plan, weights.of(plan), plan.specs, collector, ModelDigest(), lambda _: None)
    merged = time.monotonic()
    with TemporaryDirectory() as folder:
        write_companions(Path(folder), plan.base.folder, [each.folder for each in plan.experts], plan.vocabulary, None, plan.speaker)
        dtype = "float32" if plan.device.type == "cpu" else "auto"
        model = placed(partial(build_model, Path(folder), collector.tensors, dtype=dtype), plan.device)
        tokenizer = load_tokenizer(Path(folder))
    del collector
    for score in score_tasks(model, tokenizer, specs, **options):
        if any(item.score is None for item in score.items):
            raise RunError(f"'{score.metric}' has no value for a single row", where=f"task '{score.task}'", fix="give another --metric")
        candidate.items.setdefault(score.task, {}).update({int(item.id): item.score for item in score.items if item.score is not None})
    candidate.merge_seconds += merged - start
    candidate.score_seconds += time.monotonic() - merged


class _Weights:
    """Merge weights, each made once: candidates that compare the same hidden states share them."""

    def __init__(self, progress: Progress) -> None:
        self._known: dict[str, MergeWeights] = {}
        self._progress = progress

    def of(self, plan: Plan) -> MergeWeights:
        rule = plan.weights
        if isinstance(rule, tuple):
            return compute_weights(plan)
        key = json.dumps([type(rule).__name__, rule.model_dump(mode="json", exclude=AFTER_SIMILARITY)], sort_keys=True)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = compute_weights(plan, self._progress)
        if isinstance(rule, RecallWeights) and found.similarity is not None:
            return weights_from_similarity(plan, rule, found.similarity, TypicalSamples([], found.samples, found.notes))
        return found


def _ranked(candidates: Sequence[Candidate]) -> list[Candidate]:
    """From the best to the worst; before any scores, as they come."""
    return sorted(candidates, key=lambda each: -each.score if each.items else 0.0)


def _difference(one: Candidate, other: Candidate) -> Interval:
    """The score of one minus that of the other, the mean over tasks, on the rows that both were scored on; a bootstrap over these rows."""
    pairs = []
    for task, items in one.items.items():
        theirs = other.items.get(task, {})
        pairs.append(np.array([items[row] - theirs[row] for row in sorted(items) if row in theirs]))
    return bootstrap(lambda samples: float(np.mean([sample.mean() for sample in samples])), pairs)
