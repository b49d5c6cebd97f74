"""The steps of continual learning, for workspaces, benches and the demo: take an expert's input statistics, merge, score.

Each step is done once, as training is. An artefact in its place is used again if it was made from the same bytes in the same way and is
unchanged; otherwise it is made anew. A step that was stopped is finished by the same call, with the result that it would have had.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recall_merge.evaluation.scores import score_tasks
from recall_merge.evaluation.tasks import TaskSpec
from recall_merge.files.adapter import CONFIG, WEIGHTS, is_adapter
from recall_merge.files.checkpoint import open_checkpoint, read_json
from recall_merge.files.companions import hash_texts
from recall_merge.files.hashing import hash_file, hash_model
from recall_merge.files.record import versions
from recall_merge.files.statistics import InputStatistics, open_statistics
from recall_merge.merging.merge import MergeResult, merge, reuse
from recall_merge.merging.run import MergeRun
from recall_merge.merging.statistics import RANK, make_statistics
from recall_merge.report.merge_charts import draw_weights
from recall_merge.runtime.device import find_device, hardware
from recall_merge.runtime.durable import write_whole
from recall_merge.runtime.errors import CheckpointError
from recall_merge.runtime.progress import Progress, Silent
from recall_merge.runtime.sealed import read_sealed, sealed

OWN_TEXT, OWN_ROWS = "own_text.json", "own_text.jsonl"  # what a base has written, beside its statistics
KEY = "key.json"  # in the folder of an expert's statistics
SCORES_FORMAT = 3  # of the files that keep scores; part of their key


def key_of(facts: Mapping[str, Any]) -> str:
    """SHA-256 of facts: two pieces of work with the same key give the same result."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def accelerator_facts(device: str) -> dict[str, str]:
    """What an accelerator adds to the facts of work: its name, as numbers from another one differ. Nothing for the processor."""
    name = hardware(find_device(device))
    return {} if name == "cpu" else {"hardware": name}


def fingerprint(folder: Path) -> str:
    """SHA-256 of a model, an adapter's weights and settings or a checkpoint's weights and config; a dot; and that of its texts.

    Where an adapter's base lies is left out, so that folders can be moved; so is the order of names, which PEFT leaves to chance.
    Raises CheckpointError if there is no sound model.
    """
    if not folder.is_dir():
        raise CheckpointError("there is no such model folder", where=folder, fix="check the path")
    if not is_adapter(folder):
        return f"{hash_model(open_checkpoint(folder))}.{hash_texts(folder)}"
    settings = {key: sorted(value, key=str) if isinstance(value, list) else value for key, value in read_json(folder / CONFIG).items()}
    settings.pop("base_model_name_or_path", None)
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"there is no {WEIGHTS}", where=folder, fix="copy the whole adapter folder")
    return f"{key_of({'settings': settings, 'weights': hash_file(folder / WEIGHTS)})}.{hash_texts(folder)}"


def is_same(folder: Path, known: str) -> bool:
    """Whether a model has this fingerprint; those of earlier versions tell nothing of its texts."""
    return matches(fingerprint(folder), known)


def matches(found: str, known: str) -> bool:
    return known in (found, found.partition(".")[0])


class KeyedFile:
    """A JSON file that says under which key its content was made. Content of another key, or damaged, is
    ignored, and replaced by the first `write`."""

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key, self.exists = path, key, False
        self.content: dict[str, Any] = {}
        with suppress(CheckpointError):
            stored = read_sealed(path)
            if stored.pop("key", None) == key:
                self.content = stored
                self.exists = True

    def write(self) -> None:
        """Put the content in its place, in one step."""
        write_whole(self._path, sealed({"key": self._key, **self.content}))


def take_statistics(run: MergeRun, folder: Path, *, rank: int = RANK, gradients: bool = False, progress: Progress | None = None) -> None:
    """Write the input statistics of the run's newest expert, on the run's samples, into `folder`. Raises RecallError with every fault."""
    assert run.samples is not None, "statistics are taken from rows"
    facts: dict[str, Any] = {"rank": rank, "seed": run.seed, "samples": run.samples.model_dump(mode="json", exclude={"path"})}
    facts |= {"rows": run.samples.digest(), "versions": versions(), "gradients": gradients}
    facts |= {"base": fingerprint(Path(run.base)), "expert": fingerprint(Path(run.experts[-1].path))} | accelerator_facts(run.device)
    made = KeyedFile(folder / KEY, key_of(facts))
    if not made.exists:
        (folder / KEY).unlink(missing_ok=True)  # subtle: statistics that a stop leaves half replaced belong to no key
        make_statistics(run, rank=rank, gradients=gradients, folder=folder, progress=progress)
        made.write()


def take_own_statistics(
    base: Path, folder: Path, *, seed: int, device: str, rank: int = RANK, progress: Progress | None = None
) -> InputStatistics:
    """The input statistics of a base on text that it writes itself, made once; the text stays beside them. Raises what can go wrong."""
    facts = {"base": fingerprint(base), "seed": seed, "versions": versions()} | accelerator_facts(device)
    texts = KeyedFile(folder / OWN_TEXT, key_of(facts))
    if not texts.exists:
        from recall_merge.models.load import load_model
        from recall_merge.models.own_text import TEXTS, own_texts

        with (progress or Silent()).stage("the base writes texts of its own", TEXTS, "texts") as advance:
            model, tokenizer = load_model(base, None, device=device)
            texts.content = {"texts": own_texts(model, tokenizer, seed=seed, advance=advance)}
        texts.write()
    rows = folder / OWN_ROWS
    write_whole(rows, "".join(json.dumps({"text": text}) + "\n" for text in texts.content["texts"]))
    experts = [{"name": "own", "path": str(base), "is_base": True}]
    samples = {"path": str(rows), "count": len(texts.content["texts"]), "template": False}
    run = MergeRun.model_validate({"base": str(base), "experts": experts, "samples": samples, "seed": seed, "device": device})
    take_statistics(run, folder, rank=rank, progress=progress)
    statistics = open_statistics(folder)
    assert statistics is not None
    return statistics


def merge_models(run: MergeRun, *, progress: Progress | None = None) -> MergeResult:
    """Merge as the run says, into `run.out.path`. Raises what `merging.merge` raises."""
    return reuse(run) or merge(run, progress=progress, draw=draw_weights)


def scores_key(models: Mapping[str, Any], tasks: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """The key of scores: of each model its fingerprint, of each task its rows' hash and metric, and how models are asked."""
    return key_of({"format": SCORES_FORMAT, "models": models, "tasks": tasks, "asked": asked, "versions": versions()})


def score_model(
    load: Callable[[], tuple[Any, Any]], tasks: Sequence[TaskSpec], keep: Callable[[str, dict[str, Any]], None], **options: Any
) -> None:
    """Score a model on tasks, one by one: a stop loses one task at most. Without tasks, the model is not loaded.

    Args:
        load: gives the model, and its tokenizer.
        tasks: those that are not scored yet.
        keep: called with a task's name and its score, items included, as soon as it is known.
        options: as for `evaluation.scores.score_tasks`.
    """
    if not tasks:
        return
    model, tokenizer = load()
    for task in tasks:
        [score] = score_tasks(model, tokenizer, [task], **options)
        keep(task.name, asdict(score))
