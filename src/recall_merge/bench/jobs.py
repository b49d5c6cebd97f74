"""Jobs: the pieces of a bench's work, each known by a hash of all that it depends on. What has been done is found under that hash,
so resuming where a bench stopped, and sharing what methods, orders and scenarios have in common, are one and the same thing."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from recall_merge.files.checkpoint import open_checkpoint
from recall_merge.files.hashing import content_of
from recall_merge.files.rows import Row
from recall_merge.merging.run import MergeRun
from recall_merge.runtime.errors import OutputError
from recall_merge.training.settings import TrainSettings

FORM = 1  # of the jobs; those of another form are not found, and done anew
CHARACTERS_PER_TOKEN = 4


def hashed(content: Any) -> str:
    """The key of a job: 24 hex digits of SHA-256 over its content as JSON."""
    return hashlib.sha256(json.dumps([FORM, content], sort_keys=True).encode()).hexdigest()[:24]


def hash_rows(rows: Sequence[Row]) -> str:
    return hashed([[row.prompt, row.completion, row.choices] for row in rows])


@dataclass(frozen=True)
class Base:
    """The base of all; it is there already."""

    folder: Path
    fingerprint: str

    @property
    def key(self) -> str:
        return hashed(["base", self.fingerprint])


@dataclass(frozen=True)
class Trained:
    """A model fine-tuned from a base, or further from another trained model.

    Attributes:
        label: what it is, in words; no part of its key.
        rows: what it is trained on.
        start: the trained model that training goes on from.
        anchor: what earlier tasks need, for elastic weight consolidation; `strength` is its lambda.
    """

    label: str = field(compare=False)
    base: Base | Merged
    rows: tuple[Row, ...]
    settings: TrainSettings
    start: Trained | None = None
    anchor: Anchor | None = None
    strength: float = 0.0

    @cached_property
    def key(self) -> str:
        parts = [self.base.key, hash_rows(self.rows), self._told, self.start and self.start.key]
        return hashed(["trained", *parts, *([self.anchor.key, self.strength] if self.anchor else [])])

    @property
    def _told(self) -> dict[str, Any]:
        """What the settings say beyond the defaults: a setting that a later version adds leaves the key as it is."""
        return self.settings.model_dump(mode="json", exclude_defaults=True)

    @property
    def cost(self) -> float:
        return 4 * float(self.settings.epochs) * tokens_of(self.rows)  # backwards takes twice as long as forwards, and it is run twice

    @property
    def needs(self) -> list[Job]:
        return [job for job in (self.base, self.start, self.anchor) if job is not None and not isinstance(job, Base)]


@dataclass(frozen=True)
class Anchor:
    """What the tasks up to one of them need of the weights (`models/ewc.py`), told from rows of that task and the anchor before it."""

    label: str = field(compare=False)
    model: Trained
    rows: tuple[Row, ...]
    before: Anchor | None = None

    @cached_property
    def key(self) -> str:
        return hashed(["anchor", self.model.key, hash_rows(self.rows), self.before and self.before.key])

    @property
    def cost(self) -> float:
        return 4.0 * tokens_of(self.rows)

    @property
    def needs(self) -> list[Job]:
        return [self.model, *([self.before] if self.before else [])]


@dataclass(frozen=True)
class StatisticsJob:
    """The input statistics of a trained model, made from the rows that it was trained on.

    Attributes:
        samples: what a run says of how typical samples are chosen, without a path.
    """

    label: str = field(compare=False)
    model: Trained
    samples: Mapping[str, Any] = field(hash=False)

    @cached_property
    def key(self) -> str:
        return hashed(["stats", self.model.key, self.samples])

    @property
    def cost(self) -> float:
        return 3 * tokens_of(self.model.rows)

    @property
    def needs(self) -> list[Job]:
        return [self.model]


@dataclass(frozen=True)
class Merged:
    """A merge of models. It is made in memory where it is scored, and written only where another job is made from it.

    Attributes:
        run: of the method, its options, weights and samples: what a run says, with experts by name and no paths.
        samples: the newest expert's rows, where representations are compared.
        statistics: of the experts by name, where the method wants them.
    """

    label: str = field(compare=False)
    base: Base | Merged
    experts: tuple[tuple[str, Model], ...]
    run: Mapping[str, Any] = field(hash=False)
    samples: tuple[Row, ...] = ()
    statistics: tuple[tuple[str, StatisticsJob], ...] = ()

    @cached_property
    def key(self) -> str:
        experts = [[name, model.key] for name, model in self.experts]
        parts = ["merged", self.base.key, experts, self.run, hash_rows(self.samples)]
        return hashed([*parts, [[name, stats.key] for name, stats in self.statistics]] if self.statistics else parts)

    @property
    def cost(self) -> float:
        return 200.0 * len(self.experts) + 2 * tokens_of(self.samples)

    @property
    def needs(self) -> list[Job]:
        return [
            *(model for model in (self.base, *(model for _, model in self.experts)) if not isinstance(model, Base)),
            *(stats for _, stats in self.statistics),
        ]


Model = Base | Trained | Merged


@dataclass(frozen=True)
class Question:
    """A task as models are asked it."""

    task: str
    rows: tuple[Row, ...] = field(repr=False)
    metric: str | None
    template: bool
    dtype: str
    batch_size: int = field(compare=False)

    @cached_property
    def key(self) -> str:
        return hashed([hash_rows(self.rows), self.metric, self.template, self.dtype])

    @property
    def cost(self) -> float:
        asked = tokens_of(self.rows)
        if all(row.choices for row in self.rows):
            return asked
        return asked + 3 * max((len(row.completion) for row in self.rows), default=0) * max(1, len(self.rows) // self.batch_size)


@dataclass(frozen=True)
class Scores:
    """Scores of one model on some tasks; each is kept on its own."""

    label: str = field(compare=False)
    model: Model
    questions: tuple[Question, ...]

    @cached_property
    def key(self) -> str:
        return hashed(sorted(self.score_key(question) for question in self.questions))

    def score_key(self, question: Question) -> str:
        return hashed(["score", self.model.key, question.key])

    @property
    def cost(self) -> float:
        return sum(question.cost for question in self.questions) + (self.model.cost if isinstance(self.model, Merged) else 100.0)

    @property
    def needs(self) -> list[Job]:
        if isinstance(self.model, Merged):
            return self.model.needs
        return [self.model] if isinstance(self.model, Trained) else []


Job = Trained | Anchor | StatisticsJob | Merged | Scores


def tokens_of(rows: Sequence[Row]) -> float:
    return sum(len(row.plain) + len(row.completion) for row in rows) / CHARACTERS_PER_TOKEN


def full_run(
    merged: Merged, folders: Mapping[str, Path], base: Path, samples: Path | None, statistics: Mapping[str, Path] | None = None
) -> MergeRun:
    """The run of a merge, once its models, rows and statistics lie in folders."""
    told, statistics = dict(merged.run), statistics or {}
    if samples is not None:
        told["samples"] = {**told.get("samples", {}), "path": str(samples)}
    else:
        told.pop("samples", None)
    experts = [
        {"name": name, "path": str(folders[name]), "same_base": True, "stats": str(statistics[name]) if name in statistics else None}
        for name, _ in merged.experts
    ]
    return MergeRun.model_validate({**told, "base": str(base), "experts": experts, "threads": 1})


class Store:
    """The folder of all jobs that have been done. A file or folder appears in it whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def place(self, job: Trained | Anchor | StatisticsJob | Merged) -> Path:
        """Where what a job makes lies: a model's folder, input of the input statistics, or an anchor's file."""
        kind = type(job).__name__.lower()
        return self.folder / kind / (f"{job.key}.safetensors" if isinstance(job, Anchor) else job.key)

    def where(self, model: Model) -> Path:
        return model.folder if isinstance(model, Base) else self.place(model)

    def is_done(self, job: Job) -> bool:
        return not self.missing(job) if isinstance(job, Scores) else self.place(job).exists() and self._note(job).exists()

    def missing(self, job: Scores) -> list[Question]:
        """The questions that the model was not asked yet."""
        return [question for question in job.questions if not self._score(job.score_key(question)).exists()]

    def score(self, job: Scores, question: Question) -> dict[str, Any]:
        return json.loads(self._score(job.score_key(question)).read_text("utf-8"))

    def keep_score(self, job: Scores, question: Question, score: Mapping[str, Any]) -> None:
        self._write(self._score(job.score_key(question)), score)

    def keep_base(self, base: Base) -> None:
        """Keep what the base is to the bit, which its key does not tell: jobs made from another would be taken for its own.

        Raises:
            OutputError: if it is another than when the first job was made.
        """
        note, found = self.folder / "bases" / f"{base.fingerprint}.json", content_of(open_checkpoint(base.folder))
        if not note.exists():
            self._write(note, {"sha256": found})
        elif json.loads(note.read_text("utf-8")) != {"sha256": found}:
            what = "the base has changed since the bench began: what was done here is of another"
            raise OutputError(what, where=base.folder, fix="put back the base, or give another `out`")

    def keep_rows(self, rows: Sequence[Row]) -> Path:
        """Rows as a file that a run can name."""
        path = self.folder / "rows" / f"{hash_rows(rows)}.jsonl"
        if not path.exists():
            self._write_text(path, "".join(json.dumps(_record(row), ensure_ascii=False) + "\n" for row in rows))
        return path

    def note(self, job: Job, cost: float, seconds: float) -> None:
        """Keep what a job took: the time of the whole bench, and the measure for the time left."""
        kind = type(job).__name__.lower()
        self._write(self._note(job), {"kind": kind, "label": job.label, "cost": cost, "seconds": round(seconds, 2)})

    def notes(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text("utf-8")) for path in sorted((self.folder / "notes").glob("*.json"))]

    def note_merge(self, merged: Merged, seconds: float) -> None:
        """Keep how long the merge alone took, which is a part of the scoring that it was made for."""
        self._write(self._merge_note(merged), {"seconds": round(seconds, 2)})

    def merge_seconds(self, merged: Merged) -> float | None:
        path = self._merge_note(merged)
        return json.loads(path.read_text("utf-8"))["seconds"] if path.exists() else None

    def statistics_cost(self, stats: StatisticsJob) -> tuple[int, float] | None:
        """Bytes of input statistics, and the seconds that it took; None where it is not made yet."""
        if not self.is_done(stats):
            return None
        size = sum(file.stat().st_size for file in self.place(stats).iterdir())
        return size, json.loads(self._note(stats).read_text("utf-8"))["seconds"]

    def _merge_note(self, merged: Merged) -> Path:
        return self.folder / "merges" / f"{merged.key}.json"

    def seconds(self, jobs: Sequence[Job]) -> float | None:
        """What jobs and all that they need took together, each once; None where one's time is not known."""
        found: dict[str, Job] = {}

        def add(job: Job) -> None:
            if job.key not in found:
                found[job.key] = job
                for need in job.needs:
                    add(need)

        for job in jobs:
            add(job)
        notes = [self._note(job) for job in found.values() if not isinstance(job, Merged) or self._note(job).exists()]
        return sum(json.loads(note.read_text("utf-8"))["seconds"] for note in notes) if all(note.exists() for note in notes) else None

    def _note(self, job: Job) -> Path:
        return self.folder / "notes" / f"{job.key}.json"

    def _score(self, key: str) -> Path:
        return self.folder / "scores" / f"{key}.json"

    def _write(self, path: Path, content: Mapping[str, Any]) -> None:
        self._write_text(path, json.dumps(content, ensure_ascii=False, default=float) + "\n")

    def _write_text(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.partial")
        unfinished.write_text(text, "utf-8")
        unfinished.rename(path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One bench at a time: two would train the same expert into the same folder.

        Raises:
            OutputError: if another is at work.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError("another bench is at work here", where=self.folder, fix="wait for it, or give another `out`") from None
            yield


def _record(row: Row) -> dict[str, Any]:
    """A row in a form that it is read from again as it is."""
    if not row.prompt:
        return {"text": row.completion}
    if [role for role, _ in row.prompt] == ["user"]:
        return {"prompt": row.prompt[0][1], "completion": row.completion, **({"choices": row.choices} if row.choices else {})}
    turns = [*row.prompt, ("assistant", row.completion)]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}
