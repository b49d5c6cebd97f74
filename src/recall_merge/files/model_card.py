"""The model card of a result: the hub's metadata, and how the model was made. It never contains a local path.

People may edit the card, so the record does not hold its hash. Scores are added later, as a table and, for machines, as the `model-index`
of the metadata.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recall_merge.files.adapter import is_adapter
from recall_merge.runtime.durable import write_whole
from recall_merge.runtime.errors import CheckpointError, Faults
from recall_merge.runtime.safe_yaml import MAX_BYTES, NotYaml, parse_yaml

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

MODEL_CARD, PICTURE = "README.md", "weights.png"
BEGIN, END = "<!-- scores -->", "<!-- end of scores -->"  # text between these is replaced with every score
ERROR = "_stderr"  # suffix of a metric's name, as lm-eval names its standard error


def write_model_card(folder: Path, *, base: str, base_folder: Path, sources: Sequence[str], record: Mapping[str, Any]) -> None:
    """Write the card: run, weights and similarity of a record, and `weights.png` if the folder holds it.

    `base` is the base's name in the text; `sources` are the hub names of base and experts, if they have one.
    """
    from huggingface_hub import ModelCardData

    base_card: dict[str, Any] = {}
    with suppress(NotYaml):  # a base whose card cannot be read counts as one without a card
        base_card = _metadata(_read(base_folder)) if (base_folder / MODEL_CARD).is_file() else {}
    data = ModelCardData(
        base_model=list(sources) or None,
        library_name="transformers",
        license=base_card.get("license"),
        language=base_card.get("language"),
        pipeline_tag="text-generation",
        tags=["merge", "recall-merge", record["run"]["method"]],
        base_model_relation="merge",
    )
    text = _text(base, record, pictured=(folder / PICTURE).is_file())
    (folder / MODEL_CARD).write_text(f"---\n{data.to_yaml()}\n---\n\n{text}", "utf-8")


def read_model_card(folder: Path) -> ModelCard:
    """The card of a folder. Raises CheckpointError if there is none, or its metadata cannot be read."""
    from huggingface_hub import ModelCard

    if not (folder / MODEL_CARD).is_file():
        fix = "scores are added to the card of a folder that has one"
        raise CheckpointError(f"there is no model card ({MODEL_CARD})", where=folder, fix=fix)
    text = _read(folder)
    try:
        if len(text) > MAX_BYTES:
            raise NotYaml(f"it is larger than {MAX_BYTES} bytes")
        _metadata(text)
        return ModelCard(text.decode("utf-8"))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        fix = "repair the metadata at its start, or delete the file and merge again"
        raise CheckpointError(f"the model card cannot be read: {error}", where=folder / MODEL_CARD, fix=fix) from error


def card_to_publish(folder: Path, *, license: str | None = None, base_model: str | None = None) -> ModelCard:
    """A folder's card, with the licence and the base that are given; for an expert, which has no card, a new one. Nothing is written.

    Raises CheckpointError as `read_model_card`, and with each of the two that the card lacks.
    """
    card = read_model_card(folder) if (folder / MODEL_CARD).is_file() else _expert_card(folder)
    faults = Faults()
    for key, given, example in (("license", license, "apache-2.0"), ("base_model", base_model, "org/name")):
        if given is not None:
            setattr(card.data, key, given)
        if not card.data.get(key):
            fix = f"give --{key.replace('_', '-')} {example}, or add `{key}: {example}` to {MODEL_CARD}"
            faults.add(f"the model card does not say `{key}`", where=folder / MODEL_CARD, fix=fix)
    faults.raise_any(CheckpointError)
    return card


def _expert_card(folder: Path) -> ModelCard:
    from huggingface_hub import ModelCard, ModelCardData

    lora = is_adapter(folder)
    data = ModelCardData(library_name="peft" if lora else "transformers", pipeline_tag="text-generation", tags=["recall-merge"])
    data.base_model_relation = "adapter" if lora else "finetune"  # type: ignore[attr-defined]
    what = f"{'An adapter' if lora else 'A model'}, fine-tuned with [recall-merge](https://pypi.org/project/recall-merge/)."
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n# Fine-tuned model\n\n{what} `record.json` holds its settings.\n")


def add_scores(folder: Path, name: str, scores: Sequence[Mapping[str, Any]]) -> None:
    """Add scores to a folder's card: task, metric, score (0 to 1), stderr or None, and n, the rows. Raises as `read_model_card`.

    A score of the same task and metric is replaced; the rest of the card stays. The model is called `name` unless the card names it.
    """
    card = read_model_card(folder)
    new = [result for score in scores for result in _results(score)]
    replaced = {(result.dataset_type, result.metric_type) for result in new}
    data: Any = card.data
    kept = [result for result in data.eval_results or () if (result.dataset_type, result.metric_type) not in replaced]
    data.model_name = data.model_name or name
    data.eval_results = [*kept, *new]
    table = "\n".join(_scores(data.eval_results))
    before, _, rest = card.text.partition(BEGIN)
    card.text = f"{before.rstrip()}\n\n{BEGIN}\n{table}\n{END}\n\n{rest.partition(END)[2].lstrip()}"
    write_whole(folder / MODEL_CARD, str(card))


def _results(score: Mapping[str, Any]) -> Iterator[EvalResult]:
    """A score and its standard error in the hub's form."""
    from huggingface_hub import EvalResult

    task: dict[str, Any] = {"dataset_type": score["task"], "dataset_name": score["task"], "dataset_args": {"rows": score["n"]}}
    for metric, value in ((score["metric"], score["score"]), (score["metric"] + ERROR, score["stderr"])):
        if value is not None:
            yield EvalResult(task_type="text-generation", **task, metric_type=metric, metric_value=round(value, 4))


def _scores(results: Sequence[EvalResult]) -> Iterator[str]:
    errors = {(result.dataset_type, result.metric_type): result.metric_value for result in results}
    yield from ("## Scores", "", "| task | metric | score | standard error | rows |", "|---|---|---|---|---|")
    for result in results:
        if not result.metric_type.endswith(ERROR):
            error = errors.get((result.dataset_type, result.metric_type + ERROR), "-")
            rows = (result.dataset_args or {}).get("rows", "-")
            cells = (result.dataset_name, result.metric_type, result.metric_value, error, rows)
            yield "| " + " | ".join(plain(str(cell)) for cell in cells) + " |"


def plain(text: str) -> str:
    """A user's text as one line of literal Markdown, of at most 100 characters.

    >>> print(plain("<b>a|\\n[b](c)"))
    &lt;b&gt;a\\| \\[b\\](c)
    """
    line = " ".join(text.split())
    line = html.escape(line if len(line) <= 100 else line[:99] + "…", quote=False)
    return re.sub(r"([\\`*_\[\]|~!#$])", r"\\\1", line)


def _text(base: str, record: Mapping[str, Any], *, pictured: bool) -> str:
    run = record["run"]
    experts = [plain(entry["name"]) for entry in run["experts"]]
    made = (
        f"One model from {len(experts)} expert{'s' * (len(experts) > 1)} ({', '.join(experts)}) on the base {plain(base)}, "
        f"merged by `{run['method']}` with [recall-merge](https://pypi.org/project/recall-merge/) {record['versions']['recall-merge']}."
    )
    picture = [f"![Weights of the experts by layer, and the similarity that they follow from]({PICTURE})"] if pictured else []
    parts = ["# Merged model", made, *picture, f"{BEGIN}\n{END}", "## How it was made", "\n".join(_essentials(record))]
    parts += ["## Weights by layer", _table(record["weights"])]
    if record.get("similarity"):
        parts += ["## Similarity to the newest expert by layer", _table(record["similarity"])]
    parts += ["Layer 0 is the embedding, the last layer of the weights is the final norm and head. `record.json` holds the whole run."]
    return "\n\n".join(parts) + "\n"


def _essentials(record: Mapping[str, Any]) -> Iterator[str]:
    """A summary of the record."""
    method, run = record["method"], record["run"]
    yield f"- method: `{method['name']}`, {plain(method['source'])}"
    for key, value in {**run["options"], **method["options"]}.items():
        yield f"- option {plain(key)}: {plain(str(value))}"
    if record["samples"]:
        yield f"- compared on {len(record['samples'])} typical samples of the newest expert's data"
    yield f"- seed {run['seed']}; made {record['created']} with " + ", ".join(
        f"{package} {record['versions'][package]}" for package in ("torch", "transformers") if package in record["versions"]
    )


def _table(table: Mapping[str, Any]) -> str:
    """A Markdown table; consecutive layers with equal printed numbers share a line."""
    lines = ["| layer | " + " | ".join(map(plain, table["experts"])) + " |", "|---" * (1 + len(table["experts"])) + "|"]
    rows = [" | ".join(f"{number:.3f}" for number in row) for row in table["rows"]]
    for text, same in groupby(zip(table["layers"], rows, strict=True), key=itemgetter(1)):
        first, *others = [layer for layer, _ in same]
        lines.append(f"| {f'{first} to {others[-1]}' if others else first} | {text} |")
    return "\n".join(lines)


def _read(folder: Path) -> bytes:
    with (folder / MODEL_CARD).open("rb") as file:
        return file.read(MAX_BYTES + 1)


def _metadata(card: bytes) -> dict[str, Any]:
    """What stands between the first two '---' of a card. Raises NotYaml."""
    parts = card.decode("utf-8", errors="replace").split("---", 2)
    metadata = parse_yaml(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    if not isinstance(metadata, dict):
        raise NotYaml("it has no metadata between two lines of '---'")
    return metadata
