"""One stage of a workspace: validate, train, take statistics, merge, score, commit.

Each part puts its artefact in its place in one step, and is done once (`steps.py`). So a stage that was stopped, wherever that was, is
finished by asking again, with the result that it would have had.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from recall_merge.continual.kept_scores import read_scores
from recall_merge.continual.places import SCRATCH, claim_places, clear_scratch, tidy
from recall_merge.continual.protected import protected_by
from recall_merge.continual.state import (
    Model,
    Scores,
    Stage,
    StageSpec,
    State,
    found_path,
    locate_model,
    note,
    now,
    opened,
    stored_path,
    write_state,
)
from recall_merge.continual.steps import (
    KeyedFile,
    accelerator_facts,
    fingerprint,
    is_same,
    merge_models,
    score_model,
    scores_key,
    take_own_statistics,
    take_statistics,
)
from recall_merge.continual.validation import Request, StageValidation, ValidatedStage, draft
from recall_merge.evaluation.gate import Decision, decide
from recall_merge.files.adapter import is_adapter
from recall_merge.files.companions import LEFT_BY_TRAINERS
from recall_merge.files.model_card import MODEL_CARD, add_scores
from recall_merge.files.output import OutputFolder
from recall_merge.files.record import RECORD
from recall_merge.files.rows import unread_columns
from recall_merge.files.statistics import open_statistics
from recall_merge.merging.merge import MergeResult
from recall_merge.merging.rules import takes_gradients
from recall_merge.merging.run import MergeRun
from recall_merge.models.load import load_model
from recall_merge.runtime.durable import write_whole
from recall_merge.runtime.errors import Faults, WorkspaceError
from recall_merge.runtime.progress import Progress, Silent
from recall_merge.training.earlier import OWN, Earlier
from recall_merge.training.fine_tuning import train

StageScores = dict[str, dict[str, dict[str, Any]]]  # role -> task -> score, with its items
ADAPTER_FILES = (".json", ".safetensors", ".txt", ".jinja", ".model")  # that are copied; never a pickle


@dataclass(frozen=True)
class Learned:
    """What a stage has made."""

    stage: Stage
    state: State  # of the workspace now
    merge: MergeResult
    scores: StageScores
    notes: tuple[str, ...]  # what a reader should know
    decisions: tuple[Decision, ...]  # on the conditions under which its model is kept
    moved: dict[str, float]  # how far training moved the answers of the tasks that it protected, as a share of their size


def learn(folder: Path, request: Request | None = None, *, allowed: Collection[str] = (), progress: Progress | None = None) -> Learned:
    """Learn one task: fine-tune, merge, score all tasks so far.

    Args:
        request: what to learn; None goes on with the unfinished stage. So does the request that began it.
        allowed: names of the training's `arguments` that may do more than train.

    Raises:
        RecallError: with every fault that can be found before the work begins, the disk as it was; or with what went wrong later.
    """
    command = shlex.join(["recall", "learn", str(folder), *(["--task", request.task] if request else [])])
    faults, state = Faults(), None
    with ExitStack() as stack:
        with faults.collect():
            state = stack.enter_context(opened(folder, command))
        if request is None and state is not None and state.unfinished is None:
            fix = "say what to learn: --task, --train and --test"
            faults.add("nothing is unfinished, and nothing new is asked for", where=folder, fix=fix)
        spec = draft(folder, state, request) if request else state.unfinished if state else None
        if spec is None:
            faults.raise_any(WorkspaceError)
            raise AssertionError("without a stage there is a fault")
        same_base = request is not None and request.same_base
        stage = StageValidation(folder, state, spec, faults, same_base=same_base, allowed=allowed).run()
        return StageRunner(folder, stage, progress or Silent()).run()


class _Target(NamedTuple):
    """A model to be scored, and on which tasks. `base` is that of an adapter; its tokenizer is used where the folder has none."""

    folder: Path
    base: Path
    fingerprint: str
    tasks: tuple[str, ...]


class StageRunner:
    """The parts of a stage, in order. Each is skipped where its result is there already."""

    def __init__(self, folder: Path, stage: ValidatedStage, progress: Progress) -> None:
        self._folder = folder.absolute().resolve()
        self._state, self._stage, self._spec, self._settings = stage.state, stage, stage.spec, stage.settings
        self._lineage = stage.state.lineage()
        self._progress = progress
        self._rows = self._spec.train.under(self._folder) if self._spec.train else None
        self._scores_file = self._folder / "scores" / f"{self._spec.id}.json"

    def run(self) -> Learned:
        self._begin()
        with self._noted("train"):
            expert = self._train()
        with self._noted("stats"):
            stats = self._take_statistics(expert)
        with self._noted("merge"):
            result = self._merge(expert, stats)
            merged = self._model(result.path)
        with self._noted("score"):
            scores = self._score(expert, merged)
        return self._commit(expert, stats, merged, result, scores)

    def _begin(self) -> None:
        """Write down what is to be learnt. From here on the stage is finished or given up, and never half there."""
        claim_places(self._folder)
        if self._state.unfinished != self._spec:
            clear_scratch(self._folder)
            begun = self._state.model_copy(update={"unfinished": self._spec})
            write_state(self._folder, begun, was=self._state)
            self._state = begun
            self._note("begin", "done")

    def _train(self) -> Model:
        """The expert: trained here, or given. A given adapter is copied; a given checkpoint stays where it is."""
        given, target = self._spec.given, self._folder / "experts" / self._spec.name
        if given is None:
            settings = self._settings.training_settings()
            options: dict[str, Any] = {"overwrite": True, "progress": self._progress, "allowed": settings.arguments}  # validation has asked
            options["earlier"] = self._protected()
            train(self._start(self._spec), self._stage.rows, target, settings, device=self._settings.device, **options)
        else:
            source = locate_model(self._folder, given)
            if not is_adapter(source):
                return given
            if not target.exists() or not is_same(target, given.fingerprint):
                _copy_adapter(source, target)
        return self._model(target)

    def _protected(self) -> Earlier:
        """The input statistics of what the training protects: of earlier tasks, and of the base on text of its own, if that is wanted."""
        protect = self._settings.training_settings().protect
        if protect is None or not protect.wants_base:
            return self._stage.earlier
        place, facts = self._folder / "statistics" / OWN, {"seed": self._settings.seed, "device": self._settings.device}
        return {OWN: take_own_statistics(self._stage.base, place, **facts, progress=self._progress), **self._stage.earlier}

    def _take_statistics(self, expert: Model) -> str | None:
        """What the expert leaves behind about its rows, which no later stage reads, for methods that merge by statistics."""
        if self._rows is None or not self._settings.stats_rank:
            return None
        target = self._folder / "statistics" / self._spec.name
        plain = self._settings.model_copy(update={"method": "linear", "options": {}, "weights": "uniform"})
        run = plain.run(base=str(self._stage.base), experts=[self._entry(self._spec, expert)], rows=self._rows, out=str(target))
        gradients = takes_gradients(self._settings.method)
        take_statistics(run, target, rank=self._settings.stats_rank, gradients=gradients, progress=self._progress)
        return stored_path(self._folder, target)

    def _merge(self, expert: Model, stats: str | None) -> MergeResult:
        """All experts, or the merge before and the newest, in one model. The newest expert's training rows are the samples."""
        if self._settings.strategy == "sequential":
            before = [{"name": "merged", "path": str(self._before)}] if self._lineage else []
        elif self._settings.strategy == "newest":
            before = []
        else:
            before = [self._entry(stage, stage.expert, stage.stats) for stage in self._lineage]
        experts = [*before, self._entry(self._spec, expert, stats)]
        out = str(self._folder / "merges" / str(self._spec.id))
        run = self._settings.for_stage(len(experts)).run(base=str(self._stage.base), experts=experts, rows=self._rows, out=out)
        return merge_models(run, progress=self._progress)

    def _score(self, expert: Model, merged: Model) -> StageScores:
        """New tasks on the base and on the merge before, the expert's task on the expert, all tasks on the merge.

        The stage's file keeps them one by one; what it holds under the same key is not scored again.
        """
        settings, scoring, tasks = self._settings, self._settings.scoring, self._stage.tasks
        targets = self._targets(expert, merged)
        scored = (self._spec.task, *self._spec.unseen, *(stage.task for stage in self._lineage))
        hashes = {task.name: [task.test and task.test.identity, task.metric] for task in scored}
        asked = scoring.model_dump(mode="json", exclude={"batch_size"}) | {"template": settings.template}
        asked |= accelerator_facts(settings.scoring_device)
        key = scores_key({role: [target.fingerprint, target.tasks] for role, target in targets.items()}, hashes, asked)
        kept = KeyedFile(self._scores_file, key)
        scores: StageScores = kept.content.setdefault("scores", {})

        def keep(role: str, task: str, score: dict[str, Any]) -> None:
            if not scoring.words:
                for item in score["items"]:
                    item["prediction"] = ""
            scores[role][task] = score
            kept.write()

        options: dict[str, Any] = {"batch_size": scoring.batch_size, "limit": scoring.limit, "template": settings.template}
        for role, target in targets.items():
            done = scores.setdefault(role, {})
            missing = [tasks[name] for name in target.tasks if name not in done]
            load = partial(load_model, target.folder, target.base, device=settings.scoring_device, dtype=scoring.dtype)
            score_model(load, missing, partial(keep, role), **options, progress=self._progress)
        return scores

    def _targets(self, expert: Model, merged: Model) -> dict[str, _Target]:
        """The models to be scored, by their role."""
        spec, base, tasks = self._spec, self._stage.base, tuple(self._stage.tasks)
        on_base = {name for stage in self._lineage for name in stage.scores.base}
        targets = {"base": _Target(base, base, self._state.base.fingerprint, tuple(name for name in tasks if name not in on_base))}
        if self._lineage and self._stage.has_before:
            last = self._lineage[-1]
            new = tuple(name for name in tasks if name not in last.scores.merged)
            targets["before"] = _Target(self._before, base, last.merged.fingerprint, new)
        targets["expert"] = _Target(locate_model(self._folder, expert), self._start(spec), expert.fingerprint, (spec.task.name,))
        return targets | {"merged": _Target(found_path(self._folder, merged.path), base, merged.fingerprint, tasks)}

    def _commit(self, expert: Model, stats: str | None, merged: Model, result: MergeResult, scores: StageScores) -> Learned:
        """Make the stage part of the workspace, and its model the workspace's if it meets all conditions."""
        plain = {role: {name: score["score"] for name, score in tasks.items()} for role, tasks in scores.items()}
        samples, decisions = self._samples(stats, result), self._decide(scores)
        refused = tuple(decision.words for decision in decisions if not decision.holds)
        if (result.path / MODEL_CARD).is_file():
            add_scores(result.path, f"{self._folder.name}-{self._spec.id}", list(scores["merged"].values()))
        with self._noted("commit"):
            tidy(self._folder)
            if self._settings.keep_samples:
                self._write_samples(samples)
            stage = Stage(
                **self._spec.model_dump(),
                refused=refused,
                expert=expert,
                stats=stats,
                merged=merged,
                samples=samples,
                scores=Scores(file=stored_path(self._folder, self._scores_file), **({"before": {}} | plain)),
                created=now(),
            )
            head = self._state.head if refused else stage.id
            state = self._state.model_copy(update={"stages": (*self._state.stages, stage), "head": head, "unfinished": None})
            write_state(self._folder, state, was=self._state)
        return Learned(stage, state, result, scores, (*self._notes(), *result.notes), decisions, self._moved(expert))

    def _decide(self, scores: StageScores) -> tuple[Decision, ...]:
        """Every condition, by the scores of this stage's model and of the model before: the last one, or the base."""
        conditions, before = self._stage.conditions, scores.get("before", {}) if self._lineage else scores["base"]
        if self._lineage and any(condition.is_change for condition in conditions):
            before = read_scores(self._folder, self._lineage[-1])["merged"] | before
        return tuple(decide(conditions, scores["merged"], before))

    def _entry(self, spec: StageSpec, expert: Model, stats: str | None = None) -> dict[str, Any]:
        """An expert as a run lists it. It was checked when it came, so its base is the run's."""
        entry = {"name": spec.task.name, "path": str(self._on_base(spec, expert)), "same_base": True}
        return entry | ({"stats": str(found_path(self._folder, stats))} if stats else {})

    @property
    def _before(self) -> Path:
        return found_path(self._folder, self._lineage[-1].merged.path)

    def _start(self, spec: StageSpec) -> Path:
        """What an expert was, or is to be, fine-tuned from."""
        if spec.start == "base" or spec.parent == 0:
            return self._stage.base
        return found_path(self._folder, self._state.stages[spec.parent - 1].merged.path)

    def _on_base(self, spec: StageSpec, expert: Model) -> Path:
        """An expert as a model on the base: an adapter on a merge is put into that merge first."""
        folder, start = locate_model(self._folder, expert), self._start(spec)
        if start == self._stage.base or not is_adapter(folder):
            return folder
        entry = {"name": spec.task.name, "path": str(folder), "same_base": True}
        out = {"path": str(self._folder / SCRATCH / folder.name), "overwrite": True, "reload": False}
        run = MergeRun.model_validate({"base": str(start), "experts": [entry], "method": "linear", "out": out})
        return merge_models(run, progress=self._progress).path

    def _model(self, folder: Path) -> Model:
        return Model(path=stored_path(self._folder, folder), fingerprint=fingerprint(folder))

    def _samples(self, stats: str | None, result: MergeResult) -> tuple[int, ...]:
        """Positions of the typical samples that the weights are from, or else the input statistics."""
        if result.merge_weights.samples or stats is None:
            return tuple(sample.row for sample in result.merge_weights.samples)
        statistics = open_statistics(found_path(self._folder, stats))
        return tuple(statistics.facts["rows"]) if statistics is not None else ()

    def _write_samples(self, samples: tuple[int, ...]) -> None:
        file = self._folder / "samples" / f"{self._spec.name}.jsonl"
        chosen = [row for row in self._stage.rows if row.index in set(samples)]
        lines = (json.dumps({"row": row.index, "prompt": row.prompt, "completion": row.completion}, ensure_ascii=False) for row in chosen)
        write_whole(file, "".join(line + "\n" for line in lines))

    def _moved(self, expert: Model) -> dict[str, float]:
        protected = protected_by(locate_model(self._folder, expert))
        return {} if protected is None else protected.answers

    def _notes(self) -> Iterator[str]:
        method = self._settings.method
        if self._settings.training.protect is not None and self._spec.given is None and self._lineage and not self._stage.earlier:
            yield "no earlier stage was protected: none has input statistics"
        if self._settings.strategy != "newest" and not self._lineage and self._settings.for_experts(1).method != method:
            yield f"`{method}` merges two experts or more: the first stage's model is its expert, as it is"
        if self._lineage and not self._stage.has_before:
            yield f"the merge of stage {self._lineage[-1].id} is missing, so it was not scored on the new tasks"
        for name in (task.name for task in (self._spec.task, *self._spec.unseen)):
            yield from (f"test of {name}: {note}" for note in unread_columns(self._stage.tasks[name].rows or ()))

    @contextmanager
    def _noted(self, part: str) -> Iterator[None]:
        self._note(part, "begun")
        self._stage.inputs.check()
        yield
        self._note(part, "done")

    def _note(self, part: str, event: str) -> None:
        note(self._folder, stage=self._spec.id, task=self._spec.task.name, part=part, event=event)


def _copy_adapter(source: Path, target: Path) -> None:
    """Copy an adapter, with its tokenizer and statistics if it has them, in one step.

    A record stays behind, which is of the other folder; and so does what a trainer left beside the adapter.
    """
    with OutputFolder(target, overwrite=True) as out:
        for file in sorted(source.iterdir()):
            if file.is_file() and file.suffix in ADAPTER_FILES and not file.name.startswith((RECORD, *LEFT_BY_TRAINERS)):
                shutil.copyfile(file, out.path / file.name)
        out.commit()
