"""One stage of a workspace: check, train, merge, score, commit.

Each part puts its artefact in its place in one step, and is done once: what is there is used again if it was made from the same bytes in
the same way. So a stage that was stopped, wherever that was, is finished by asking again, with the result that it would have had.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recall_merge.continual.artefacts import KEY, SCRATCH, copy_adapter, key_in, make_way, tidy
from recall_merge.continual.request import Request, draft
from recall_merge.continual.scores import Kept, Target, score, scores_key
from recall_merge.continual.state import (
    Model,
    Scores,
    Stage,
    StageSpec,
    State,
    fingerprint,
    found_path,
    key_of,
    note,
    now,
    opened,
    stored_path,
    write_state,
)
from recall_merge.continual.validation import Check, Ready, locate_model, refuse_other
from recall_merge.files.adapter import is_adapter
from recall_merge.files.durable import write_whole
from recall_merge.files.model_card import MODEL_CARD, add_scores
from recall_merge.files.record import versions
from recall_merge.files.statistics import open_statistics
from recall_merge.merging.merge import MergeResult, merge, reuse
from recall_merge.merging.run import MergeRun
from recall_merge.merging.statistics import make_statistics
from recall_merge.runtime.errors import Faults, WorkspaceError
from recall_merge.runtime.progress import Progress, Silent


@dataclass(frozen=True)
class Learned:
    """What a stage has made.

    Attributes:
        stage: it, as the state keeps it.
        state: the workspace now.
        merge: the merge, with its weights.
        scores: role -> task -> score with its items.
        notes: what a reader should know.
    """

    stage: Stage
    state: State
    merge: MergeResult
    scores: Kept
    notes: tuple[str, ...]


def learn(folder: Path, request: Request | None = None, *, progress: Progress | None = None) -> Learned:
    """Learn one task: fine-tune, merge, score all tasks so far.

    Args:
        request: what to learn; None goes on with a stage that was begun and stopped. The same request does so, too.

    Raises:
        RecallError: with every fault that can be found before the work begins, the disk as it was; or with what went wrong later.
    """
    name = request.task if request else None
    with ExitStack() as stack:
        state, ready = _check(folder, request, shlex.join(["recall", "learn", str(folder), *(["--task", name] if name else [])]), stack)
        work = Work(folder, state, ready, progress or Silent())
        work.begin()
        expert = work.train()
        stats = work.stats(expert)
        merged, made = work.merge(expert, stats)
        scores = work.score(expert, merged)
        return work.commit(expert, stats, merged, made, scores)


def _check(folder: Path, request: Request | None, command: str, stack: ExitStack) -> tuple[State, Ready]:
    """Lock the workspace as long as the stack lasts, and check everything."""
    faults = Faults()
    state: State | None = None
    with faults.collect():
        state = stack.enter_context(opened(folder, command))
    if request is not None:
        stage_spec = draft(folder, state, request)
    elif state is not None and state.unfinished is not None:
        stage_spec = state.unfinished
    else:
        if state is not None:
            faults.add(
                "nothing is unfinished, and nothing new is asked for", where=folder, fix="say what to learn: --task, --train and --test"
            )
        faults.raise_any(WorkspaceError)
        raise AssertionError("there is a fault")
    check = Check(folder, state, stage_spec, same_base=request is not None and request.same_base)
    faults.extend(check.faults)
    if state is not None and not len(faults):
        with faults.collect():
            refuse_other(folder, state, check.ready().stage_spec)
    faults.raise_any(WorkspaceError)
    assert state is not None
    return state, check.ready()


class Work:
    """The parts of a stage, in order. Each is skipped where its result is there already."""

    def __init__(self, folder: Path, state: State, ready: Ready, progress: Progress) -> None:
        self._folder = folder.absolute().resolve()
        self._state, self._ready, self._lesson = state, ready, ready.stage_spec
        self._lineage = state.lineage()
        self._progress = progress

    def begin(self) -> None:
        """Write down what is to be learnt. From here on the stage is finished or given up, and never half there."""
        if self._state.unfinished != self._lesson:
            shutil.rmtree(self._folder / SCRATCH, ignore_errors=True)
            self._state = self._state.changed(unfinished=self._lesson)
            write_state(self._folder, self._state)
            self._note("begin", "done")

    def train(self) -> Model:
        """The expert: trained here, or given. A given adapter is copied; a given checkpoint stays where it is."""
        stage_spec, target = self._lesson, self._folder / "experts" / f"{self._lesson.id}-{self._lesson.task.name}"
        with self._noted("train"):
            if stage_spec.given is not None:
                place = locate_model(self._folder, stage_spec.given)
                if not is_adapter(place):
                    return stage_spec.given
                if not target.exists() or fingerprint(target) != stage_spec.given.fingerprint:
                    copy_adapter(place, target)
            else:
                from recall_merge.training.fine_tuning import train

                make_way(target)
                settings = self._ready.settings.training_settings()
                train(self._start(stage_spec), self._ready.rows, target, settings, overwrite=True, progress=self._progress)
            return self._model(target)

    def stats(self, expert: Model) -> str | None:
        """What the expert leaves behind about its rows, which no later stage reads: statistics for methods that merge by statistics."""
        stage_spec, settings = self._lesson, self._ready.settings
        if stage_spec.train is None or not settings.stats_rank:
            return None
        target = self._folder / "statistics" / f"{stage_spec.id}-{stage_spec.task.name}"
        with self._noted("stats"):
            plain = settings.model_copy(update={"method": "linear", "options": {}, "weights": "uniform"})
            run = plain.run(base=str(self._ready.base), experts=[self._entry(stage_spec, expert)], rows=self._rows, out=str(target))
            asked = {"samples": settings.samples.model_dump() if settings.samples else None, "template": settings.template}
            asked |= {"rank": settings.stats_rank, "seed": settings.seed, "rows": stage_spec.train.sha256, "versions": versions()}
            key = key_of(asked | {"base": self._state.base.fingerprint, "expert": expert.fingerprint})
            if key_in(target) != key:
                (target / KEY).unlink(missing_ok=True)
                make_statistics(run, rank=settings.stats_rank, folder=target, progress=self._progress)
                write_whole(target / KEY, json.dumps({"key": key}) + "\n")
        return stored_path(self._folder, target)

    def merge(self, expert: Model, stats: str | None) -> tuple[Model, MergeResult]:
        """All experts, or the merge before and the newest, in one model. The newest expert's training rows are the samples."""
        target = self._folder / "merges" / str(self._lesson.id)
        with self._noted("merge"):
            newest = self._entry(self._lesson, expert, stats)
            if self._ready.settings.strategy == "sequential":
                before = [{"name": "merged", "path": str(self._before)}] if self._lineage else []
            else:
                before = [self._entry(stage, stage.expert, stage.stats) for stage in self._lineage]
            settings = self._ready.settings.of_so_many(len(before) + 1)
            run = settings.run(base=str(self._ready.base), experts=[*before, newest], rows=self._rows, out=str(target))
            made = reuse(run) or merge(run, progress=self._progress)
            return self._model(target), made

    def score(self, expert: Model, merged: Model) -> Kept:
        """New tasks on the base and on the merge before, the expert's task on the expert, all tasks on the merge."""
        stage_spec, base, specs = self._lesson, self._ready.base, self._ready.specs
        with self._noted("score"):
            on_base = {name for stage in self._lineage for name in stage.scores.base}
            targets = [Target("base", base, base, self._state.base.fingerprint, tuple(name for name in specs if name not in on_base))]
            if self._lineage and self._ready.has_before:
                last = self._lineage[-1]
                new = tuple(name for name in specs if name not in last.scores.merged)
                targets.append(Target("before", self._before, base, last.merged.fingerprint, new))
            place = locate_model(self._folder, expert)
            targets.append(Target("expert", place, self._start(stage_spec), expert.fingerprint, (stage_spec.task.name,)))
            targets.append(Target("merged", found_path(self._folder, merged.path), base, merged.fingerprint, tuple(specs)))
            tasks = (stage_spec.task, *stage_spec.unseen, *(stage.task for stage in self._lineage))
            hashes = {task.name: [task.test.sha256 if task.test else None, task.metric] for task in tasks}
            key = scores_key(targets, hashes, self._ready.settings)
            self._scores_file.parent.mkdir(exist_ok=True)
            return score(self._scores_file, targets, list(specs.values()), self._ready.settings, key, self._progress)

    def commit(self, expert: Model, stats: str | None, merged: Model, made: MergeResult, scores: Kept) -> Learned:
        """Make the stage part of the workspace, and its merge the workspace's model."""
        plain = {role: {name: found["score"] for name, found in tasks.items()} for role, tasks in scores.items()}
        samples = self._samples(stats, made)
        self._tell_card(merged, scores)
        with self._noted("commit"):
            tidy(self._folder)
            if self._ready.settings.keep_samples:
                self._write_samples(samples)
            stage = Stage(
                **self._lesson.model_dump(),
                expert=expert,
                stats=stats,
                merged=merged,
                samples=samples,
                scores=Scores(file=stored_path(self._folder, self._scores_file), **({"before": {}} | plain)),
                created=now(),
            )
            state = self._state.changed(stages=(*self._state.stages, stage), head=stage.id, unfinished=None)
            write_state(self._folder, state)
        return Learned(stage, state, made, scores, (*self._notes(), *made.notes))

    def _tell_card(self, merged: Model, scores: Kept) -> None:
        """The scores of the merge come into its model card."""
        if (place := found_path(self._folder, merged.path) / MODEL_CARD).is_file():
            add_scores(place.parent, f"{self._folder.name}-{self._lesson.id}", list(scores["merged"].values()))

    @property
    def _rows(self) -> str | None:
        return str(found_path(self._folder, self._lesson.train.path)) if self._lesson.train else None

    def _entry(self, stage_spec: StageSpec, expert: Model, stats: str | None = None) -> dict[str, Any]:
        """An expert as a run lists it. It was checked when it came, so its base is the run's."""
        entry = {"name": stage_spec.task.name, "path": str(self._whole(stage_spec, expert)), "same_base": True}
        return entry | ({"stats": str(found_path(self._folder, stats))} if stats else {})

    @property
    def _before(self) -> Path:
        return found_path(self._folder, self._lineage[-1].merged.path)

    @property
    def _scores_file(self) -> Path:
        return self._folder / "scores" / f"{self._lesson.id}.json"

    def _start(self, stage_spec: StageSpec) -> Path:
        """What an expert was, or is to be, fine-tuned from."""
        if stage_spec.start == "base" or stage_spec.parent == 0:
            return self._ready.base
        return found_path(self._folder, self._state.stages[stage_spec.parent - 1].merged.path)

    def _whole(self, stage_spec: StageSpec, expert: Model) -> Path:
        """An expert in a form that is one on the base: an adapter on a merge is put into that merge first."""
        place, start = locate_model(self._folder, expert), self._start(stage_spec)
        if start == self._ready.base or not is_adapter(place):
            return place
        target = self._folder / SCRATCH / place.name
        entry = {"name": stage_spec.task.name, "path": str(place), "same_base": True}
        out = {"path": str(target), "overwrite": True, "reload": False}
        run = MergeRun.model_validate({"base": str(start), "experts": [entry], "method": "linear", "out": out})
        return (reuse(run) or merge(run, progress=self._progress)).path

    def _model(self, place: Path) -> Model:
        return Model(path=stored_path(self._folder, place), fingerprint=fingerprint(place))

    def _samples(self, stats: str | None, made: MergeResult) -> tuple[int, ...]:
        """Positions of the typical samples: those that the weights are from, or else those that the input statistics is from."""
        if made.merge_weights.samples or stats is None:
            return tuple(sample.row for sample in made.merge_weights.samples)
        found = open_statistics(found_path(self._folder, stats))
        return tuple(found.facts["rows"]) if found is not None else ()

    def _write_samples(self, samples: Sequence[int]) -> None:
        file = self._folder / "samples" / f"{self._lesson.id}-{self._lesson.task.name}.jsonl"
        file.parent.mkdir(exist_ok=True)
        chosen = [row for row in self._ready.rows if row.index in set(samples)]
        lines = (json.dumps({"row": row.index, "prompt": row.prompt, "completion": row.completion}, ensure_ascii=False) for row in chosen)
        write_whole(file, "".join(line + "\n" for line in lines))

    def _notes(self) -> Iterator[str]:
        method = self._ready.settings.method
        if not self._lineage and self._ready.settings.of_so_many(1).method != method:
            yield f"`{method}` merges two experts or more: the first stage's model is its expert, as it is"
        if self._lineage and not self._ready.has_before:
            yield f"the merge of stage {self._lineage[-1].id} is not there, so it was not scored on what is new"

    @contextmanager
    def _noted(self, part: str) -> Iterator[None]:
        self._note(part, "begun")
        yield
        self._note(part, "done")

    def _note(self, part: str, event: str) -> None:
        note(self._folder, stage=self._lesson.id, task=self._lesson.task.name, part=part, event=event)
