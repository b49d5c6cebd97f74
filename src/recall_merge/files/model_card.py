"""The model card of a result: what the hub needs to know, and how the model was made. No local path is ever in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recall_merge.safe_yaml import MAX_BYTES, NotYaml, parse_yaml

CARD = "README.md"


def write_card(folder: Path, *, base: str, base_folder: Path, sources: Sequence[str], record: Mapping[str, Any]) -> None:
    """Write the card.

    Args:
        base: how the base is called in text.
        sources: hub names of base and experts, those that have one.
        record: as in `record.json`; its run, weights and similarity are told.
    """
    from huggingface_hub import ModelCardData

    known = _front_matter(base_folder)
    data = ModelCardData(
        base_model=list(sources) or None,
        library_name="transformers",
        license=known.get("license"),
        language=known.get("language"),
        pipeline_tag="text-generation",
        tags=["merge", "recall-merge", record["run"]["method"]],
        base_model_relation="merge",
        eval_results=None,
    )
    (folder / CARD).write_text(f"---\n{data.to_yaml()}\n---\n\n{_text(folder.name, base, record)}", "utf-8")


def _text(name: str, base: str, record: Mapping[str, Any]) -> str:
    run = record["run"]
    experts = [entry["name"] for entry in run["experts"]]
    lines = [
        "# Merged model",
        "",
        f"One model from {len(experts)} expert{'s' * (len(experts) > 1)} ({', '.join(experts)}) on the base {base}, "
        f"merged by `{run['method']}` with [recall-merge](https://pypi.org/project/recall-merge/) {record['versions']['recall-merge']}.",
        "",
        "## Weights by depth",
        "",
        *_table(record["weights"]),
        "",
    ]
    if record.get("similarity"):
        lines += ["## Similarity to the newest expert by depth", "", *_table(record["similarity"]), ""]
    lines += ["Depth 0 is the embedding, the last depth of the weights is the final norm and head. `record.json` holds the whole run.", ""]
    return "\n".join(lines)


def _table(table: Mapping[str, Any]) -> list[str]:
    """A Markdown table; runs of depths whose numbers print alike share a line."""
    lines = ["| depth | " + " | ".join(table["experts"]) + " |", "|---" * (1 + len(table["experts"])) + "|"]
    shown: list[tuple[int, int, str]] = []
    for depth, row in zip(table["depths"], table["rows"], strict=True):
        text = " | ".join(f"{number:.3f}" for number in row)
        if shown and shown[-1][2] == text:
            shown[-1] = (shown[-1][0], depth, text)
        else:
            shown.append((depth, depth, text))
    return lines + [f"| {first if first == last else f'{first} to {last}'} | {text} |" for first, last, text in shown]


def _front_matter(base: Path) -> dict[str, Any]:
    """What the base's own card says of itself; nothing if it has none that can be read."""
    card = base / CARD
    if not card.is_file():
        return {}
    with card.open("rb") as file:
        parts = file.read(MAX_BYTES).decode("utf-8", errors="replace").split("---", 2)
    try:
        found = parse_yaml(parts[1]) if len(parts) == 3 and not parts[0].strip() else {}
    except NotYaml:
        return {}
    return found if isinstance(found, dict) else {}
