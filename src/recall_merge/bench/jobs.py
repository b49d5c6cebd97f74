"""Jobs: the pieces of a bench's work, each with a key that is a hash of all that it depends on, and the store of those that are done.

So a bench goes on where it stopped, and methods, orders and scenarios share what they have in common.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from recall_merge.continual.steps import fingerprint, is_same
from recall_merge.files.rows import Row
from recall_merge.runtime.durable import write_whole
from recall_merge.runtime.errors import OutputError
from recall_merge.runtime.lock import lock
from recall_merge.runtime.sealed import read_sealed, sealed
from recall_merge.training.settings import TrainSettings

FORM = 2  # of the jobs; those of another form are not found, and are done again
CHARACTERS_PER_TOKEN = 4


def hashed(content: Any) -> str:
    """The key of a job: 24 hex digits of SHA-256 over its content as JSON."""
    return hashlib.sha256(json.dumps([FORM, content], sort_keys=True).encode()).hexdigest()[:24]


def hash_rows(rows: Sequence[Row]) -> str:
    return hashed([[row.prompt, row.completion, row.choices, *_further(row)] for row in rows])


def _further(row: Row) -> list[Any]:
    """What few rows have, left out where it is missing."""
    return [*([row.details] if row.details else []), *([] if row.template is None else [{"template": row.template}])]


@dataclass(frozen=True)
class Base:
    """The base of all trials, which is there already, and where they run."""

    folder: Path
    fingerprint: str
    device: str = "cpu"  # where all jobs are done
    hardware: str = "cpu"  # what that is: another one gives other numbers

    @property
    def key(self) -> str:
        return hashed(["base", self.fingerprint, *([] if self.hardware == "cpu" else [self.hardware])])


@dataclass(frozen=True)
class Trained:
    """A model that is fine-tuned from a base, or further from another trained model."""

    kind: ClassVar = "trained"
    label: str = field(compare=False)  # what it is, in words; no part of its key
    base: Base | Merged
    rows: tuple[Row, ...]
    settings: TrainSettings
    start: Trained | None = None  # the trained model that training goes on from
    anchor: Anchor | None = None  # what earlier tasks need, for elastic weight consolidation
    strength: float = 0.0  # lambda of that, or of what follows
    apart: tuple[Trained, ...] = ()  # adapters of earlier tasks, at right angles to which this one is held
    earlier: tuple[tuple[str, StatisticsJob | OwnStatistics], ...] = ()  # of earlier tasks, which are protected, and of the base itself

    @cached_property
    def key(self) -> str:
        settings = self.settings.model_dump(mode="json", exclude_defaults=True)  # so that a setting of a later version keeps the key
        held = [self.anchor.key, self.strength] if self.anchor else []
        held += [[model.key for model in self.apart], self.strength] if self.apart else []
        protected = [[task, statistics.key] for task, statistics in self.earlier]
        return hashed(["trained", self.base.key, hash_rows(self.rows), settings, self.start and self.start.key, *held, *protected])


@dataclass(frozen=True)
class Anchor:
    """What the tasks up to one of them need of the weights (`training/ewc.py`), from rows of that task and the anchor before it."""

    kind: ClassVar = "anchor"
    label: str = field(compare=False)
    model: Trained
    rows: tuple[Row, ...]
    before: Anchor | None = None

    @cached_property
    def key(self) -> str:
        return hashed(["anchor", self.model.key, hash_rows(self.rows), self.before and self.before.key])


@dataclass(frozen=True)
class StatisticsJob:
    """The input statistics of a trained model on the rows that it was trained on."""

    kind: ClassVar = "statistics"
    label: str = field(compare=False)
    model: Trained
    samples: Mapping[str, Any] = field(hash=False)  # how typical samples are chosen: as in a run, without a path
    gradients: bool = False

    @cached_property
    def key(self) -> str:
        return hashed(["statistics", self.model.key, self.samples, *(["gradients"] if self.gradients else [])])


@dataclass(frozen=True)
class OwnStatistics:
    """The input statistics of the base on text that it writes itself."""

    kind: ClassVar = "statistics"
    label: str = field(compare=False)
    model: Base
    seed: int

    @cached_property
    def key(self) -> str:
        return hashed(["own statistics", self.model.key, self.seed])


@dataclass(frozen=True)
class Merged:
    """A merge of models. It is made in memory where it is scored, and written only where another job is made from it."""

    kind: ClassVar = "merged"
    label: str = field(compare=False)
    base: Base | Merged
    experts: tuple[tuple[str, Model], ...]
    run: Mapping[str, Any] = field(hash=False)  # method, options, weights and samples, without experts and paths
    samples: tuple[Row, ...] = ()  # the newest expert's rows, where hidden states are compared
    statistics: tuple[tuple[str, StatisticsJob], ...] = ()  # of the experts by name, where the method wants them

    @cached_property
    def key(self) -> str:
        experts, statistics = ([[name, job.key] for name, job in jobs] for jobs in (self.experts, self.statistics))
        return hashed(["merged", self.base.key, experts, self.run, hash_rows(self.samples), statistics])


Model = Base | Trained | Merged


@dataclass(frozen=True)
class Question:
    """A task as models are scored on it."""

    task: str
    rows: tuple[Row, ...] = field(repr=False)
    metric: str | None
    template: bool | str
    dtype: str
    batch_size: int = field(compare=False)

    @cached_property
    def key(self) -> str:
        return hashed([hash_rows(self.rows), self.metric, self.template, self.dtype])

    @property
    def cost(self) -> float:
        read = tokens_of(self.rows)
        if all(row.choices for row in self.rows):
            return read
        return read + 3 * max((len(row.completion) for row in self.rows), default=0) * max(1, len(self.rows) // self.batch_size)


@dataclass(frozen=True)
class Scores:
    """Scores of one model on some tasks; each is kept on its own."""

    kind: ClassVar = "scores"
    label: str = field(compare=False)
    model: Model
    questions: tuple[Question, ...]

    @cached_property
    def key(self) -> str:
        return hashed(sorted(self.score_key(question) for question in self.questions))

    def score_key(self, question: Question) -> str:
        return hashed(["score", self.model.key, question.key])


Job = Trained | Anchor | StatisticsJob | OwnStatistics | Merged | Scores


def base_of(job: Job | Base) -> Base:
    """The base of the trial that a job belongs to."""
    while not isinstance(job, Base):
        job = job.base if isinstance(job, Trained | Merged) else job.model
    return job


def tokens_of(rows: Sequence[Row]) -> float:
    return sum(len(row.plain) + len(row.completion) for row in rows) / CHARACTERS_PER_TOKEN


def cost_of(job: Job) -> float:
    """About how long a job takes, as the number of tokens in a forward pass."""
    match job:
        case Trained():  # the backward pass takes twice as long as the forward pass, and the forward pass is run twice
            return 4 * float(job.settings.epochs) * tokens_of(job.rows)
        case Anchor():
            return 4 * tokens_of(job.rows)
        case StatisticsJob():
            return 3 * tokens_of(job.model.rows)
        case OwnStatistics():  # a token at a time
            return 20_000
        case Merged():
            return 200.0 * len(job.experts) + 2 * tokens_of(job.samples)
        case Scores():
            return sum(question.cost for question in job.questions) + (cost_of(job.model) if isinstance(job.model, Merged) else 100.0)


def needs_of(job: Job) -> list[Job]:
    """The jobs that must be done before this one."""
    match job:
        case Trained():
            parts = (job.base, job.start, job.anchor, *job.apart, *(statistics for _, statistics in job.earlier))
        case Anchor():
            parts = (job.model, job.before)
        case StatisticsJob() | OwnStatistics():
            parts = (job.model,)
        case Merged():
            parts = (job.base, *(model for _, model in job.experts), *(statistics for _, statistics in job.statistics))
        case Scores():  # a merge is made in memory
            parts = needs_of(job.model) if isinstance(job.model, Merged) else (job.model,)
    return [part for part in parts if part is not None and not isinstance(part, Base)]


def with_needs(jobs: Iterable[Job]) -> list[Job]:
    """Jobs and all that they need, each once and after those that it needs."""
    ordered: dict[str, Job] = {}

    def add(job: Job) -> None:
        if job.key not in ordered:
            for need in needs_of(job):
                add(need)
            ordered[job.key] = job

    for job in jobs:
        add(job)
    return list(ordered.values())


@dataclass(frozen=True)
class Store:
    """The folder of all jobs that are done. A file or folder appears in it whole or not at all."""

    folder: Path

    def path_of(self, job: Trained | Anchor | StatisticsJob | OwnStatistics | Merged) -> Path:
        """What a job makes: a model's folder, the folder of input statistics, or an anchor's file."""
        return self.folder / job.kind / (f"{job.key}.safetensors" if isinstance(job, Anchor) else job.key)

    def folder_of(self, model: Model) -> Path:
        return model.folder if isinstance(model, Base) else self.path_of(model)

    def is_done(self, job: Job) -> bool:
        """Whether what a job makes is there, and its note, which is written last."""
        made = not self.missing(job) if isinstance(job, Scores) else self.path_of(job).exists()
        return made and self._file("notes", job.key).exists()

    def missing(self, job: Scores) -> list[Question]:
        """The questions that have no score yet."""
        return [question for question in job.questions if not self._file("scores", job.score_key(question)).exists()]

    def keep_base(self, base: Base) -> None:
        """Keep the hash of the whole base, which its key does not hold. Raises OutputError if the jobs here are another base's."""
        known = self.read("bases", base.fingerprint).get("sha256")
        if known is not None and not is_same(base.folder, known):
            what = "the base has changed since the bench began: the jobs here were made from another one"
            raise OutputError(what, where=base.folder, fix="put back the base, or give another `out`")
        if known is None:
            self.write("bases", base.fingerprint, {"sha256": fingerprint(base.folder)})

    def keep_rows(self, rows: Sequence[Row]) -> Path:
        """Rows as a file that a run can name."""
        path = self.folder / "rows" / f"{hash_rows(rows)}.jsonl"
        if not path.exists():
            write_whole(path, "".join(json.dumps(_record(row), ensure_ascii=False) + "\n" for row in rows))
        return path

    def notes(self) -> list[dict[str, Any]]:
        """What is noted about every job that is done: its kind, label, cost and seconds."""
        return [read_sealed(path) for path in sorted((self.folder / "notes").glob("*.json"))]

    def seconds(self, jobs: Iterable[Job]) -> float | None:
        """What jobs and all that they need took together, each once; None where one's time is not known."""
        notes = [self.read("notes", job.key) for job in with_needs(jobs) if not isinstance(job, Merged) or self.is_done(job)]
        return sum(note["seconds"] for note in notes) if all(notes) else None

    def read(self, kind: str, key: str) -> dict[str, Any]:
        """What is kept about a job; empty if nothing is."""
        file = self._file(kind, key)
        return read_sealed(file) if file.exists() else {}

    def write(self, kind: str, key: str, content: Mapping[str, Any]) -> None:
        write_whole(self._file(kind, key), sealed(content, indent=None))

    def _file(self, kind: str, key: str) -> Path:
        return self.folder / kind / f"{key}.json"

    def locked(self) -> AbstractContextManager[None]:
        """One bench at a time, since two would train the same expert into the same folder: another one gets an OutputError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return lock(self.folder, "recall bench", what="the bench", error=OutputError)


def _record(row: Row) -> dict[str, Any]:
    """A row in a form that is read back as it is."""
    if not row.prompt:
        return {"text": row.completion}
    choices = {"choices": row.choices} if row.choices else {}
    if row.details:
        return {"prompt": row.turns[:-1], "completion": row.turns[-1:], "tools": row.tools, **choices}
    if [role for role, _ in row.prompt] == ["user"]:
        return {"prompt": row.prompt[0][1], "completion": row.completion, **choices}
    return {"prompt": row.turns[:-1], "completion": row.completion, **choices}
