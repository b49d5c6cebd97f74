"""What commands print: tables for people, JSON for machines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recall_merge.cli import terminal_charts
from recall_merge.cli.console import err, out
from recall_merge.merging.run import LossWeights, RecallWeights
from recall_merge.runtime.errors import RunError, did_you_mean

if TYPE_CHECKING:
    from recall_merge.demo.demo import DemoResult
    from recall_merge.files.statistics import InputStatistics
    from recall_merge.merging.cost import Estimate
    from recall_merge.merging.merge import MergeResult
    from recall_merge.merging.plan import Plan
    from recall_merge.merging.weights import MergeWeights


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))  # noqa: T201


def merged(result: MergeResult, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        return print_json({"path": str(result.path), "record": result.record})
    if not quiet:
        _weights(result.merge_weights)
        notes(result.notes)
    out().print(f"merged by {result.record['method']['name']} into {result.path}", markup=False)
    return None


def weighed(merge_weights: MergeWeights, *, picture: Path | None, as_json: bool, quiet: bool) -> None:
    similarity = None if merge_weights.similarity is None else merge_weights.table(merge_weights.similarity)
    weights = merge_weights.table(merge_weights.weights)
    if picture is not None:
        from recall_merge.report.merge_charts import draw_weights

        draw_weights(similarity, weights, picture)
    if as_json:
        samples = [{"row": sample.row, "tokens": sample.tokens, "cluster": sample.cluster} for sample in merge_weights.samples]
        return print_json({"similarity": similarity, "weights": weights, "samples": samples, "notes": list(merge_weights.notes)})
    _weights(merge_weights)
    if not quiet:
        notes(merge_weights.notes)
    if picture is not None:
        out().print(f"picture: {picture}", markup=False)
    return None


def planned(plan: Plan, estimate: Estimate, *, as_json: bool) -> None:
    from recall_merge.merging.cost import passes, peak_memory

    facts: dict[str, Any] = {
        "base": plan.run.base,
        "experts": {expert.name: str(plan.located[expert.name].folder) for expert in plan.experts},
        "method": plan.name,
        "options": dict(plan.options),
        "weights": _rule(plan.weights),
        "blocks": plan.base.layers.blocks,
        "tensors": len(plan.specs),
        "shards": len(plan.shards),
        "passes": passes(plan),
        "bytes_to_download": plan.bytes_to_download,
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "memory": peak_memory(plan),
        "seconds": round(estimate.seconds, 1),
        "notes": plan.notes,
    }
    if isinstance(plan.weights, RecallWeights | LossWeights):
        facts["weights_options"] = plan.weights.model_dump()
    if as_json:
        return print_json(facts)
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        if name != "notes":
            table.add_row(name.replace("_", " "), _words(name, value))
    out().print(table)
    notes(plan.notes)
    out().print("no faults found; nothing was written. The time is a guess from a short probe of this machine.")
    return None


def methods(name: str | None, *, as_json: bool) -> None:
    from recall_merge.maths.methods import ALIASES, METHODS
    from recall_merge.merging.rules import WEIGHT_OPTIONS

    entries = {**ALIASES, **METHODS}
    if name is None:
        if as_json:
            return print_json({entry.name: {"source": entry.source, "summary": entry.doc.splitlines()[0]} for entry in entries.values()})
        from rich.table import Table

        table = Table("method", "what it does", "source", box=None)
        for entry in entries.values():
            table.add_row(entry.name, entry.doc.splitlines()[0], entry.source)
        out().print(table)
        return None
    if name not in entries:
        raise RunError(f"there is no method '{name}'", fix=did_you_mean(name, entries))
    entry = entries[name]
    method = METHODS[ALIASES[name].method] if name in ALIASES else METHODS[name]
    doc = entry.doc + method.options_doc if name in ALIASES else method.doc
    options = {key: str(parameter.default) for key, parameter in method.options.items()}
    fields = WEIGHT_OPTIONS[ALIASES[name].weights].model_fields if name in ALIASES else {}
    described = {key: (str(field.default), field.description or "") for key, field in fields.items()}
    if as_json:
        return print_json({"name": name, "source": entry.source, "doc": doc, "options": options, "weights": described})
    console = out()
    console.print(f"{name}\n\n{doc}\n\nsource: {entry.source}", markup=False)
    if described:
        console.print("\nOptions of its weights:")
        for key, (default, meaning) in described.items():
            console.print(f"    {key} = {default}: {meaning}", markup=False)
    return None


def stats(made: InputStatistics, *, as_json: bool) -> None:
    facts = {key: value for key, value in made.facts.items() if key != "tensors"}
    if as_json:
        return print_json({"path": str(made.folder), "bytes": made.nbytes, "tensors": len(made.facts["tensors"]), **facts})
    samples = f"{facts['samples']} typical samples, {facts['tokens']} tokens"
    words = f"{made.nbytes / 1e6:.1f} MB on {len(made.facts['tensors'])} linear maps, from {samples}"
    out().print(f"statistics in {made.folder}: {words}; it holds no text", markup=False)
    return None


def demo(result: DemoResult, *, as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        scores = {
            model: {task: {"score": s.score, "stderr": s.stderr, "n": s.n} for task, s in row.items()}
            for model, row in result.scores.items()
        }
        facts = {"scores": scores, "answers": [asdict(answer) for answer in result.answers], "reused": list(result.reused)}
        return print_json({"merged": str(result.merged.path), "picture": str(result.picture), **facts})
    from rich.table import Table

    console = out()
    console.print()
    table = Table("model", *(task.name for task in result.tasks), "mean", box=None)
    for model, row in result.scores.items():
        numbers = [row[task.name] for task in result.tasks]
        shown = [f"{s.score:.2f} ± {s.stderr or 0:.2f}" for s in numbers]
        name = f"expert {model}" if any(model == task.name for task in result.tasks) else model
        table.add_row(name, *shown, f"{sum(s.score for s in numbers) / len(numbers):.3f}")
    console.print(table)
    rows = next(iter(result.scores.values()))
    console.print(
        "scores on test rows, ± standard error: "
        + ", ".join(f"{t.name} = {t.kind}, {rows[t.name].n} rows, {rows[t.name].metric}" for t in result.tasks),
        markup=False,
    )
    for answer in result.answers:
        console.print(f"\nquestion: {answer.question}\n   right: {answer.right}", markup=False)
        for model, words in answer.said.items():
            console.print(f"   {model}: {' '.join(words.split())}", markup=False)
    console.print()
    if result.reused:
        console.print("kept from an earlier run, unchanged to the byte: " + ", ".join(result.reused), markup=False)
    console.print(f"picture of similarity and weights: {result.picture}", markup=False)
    console.print(f"the merged model: {result.merged.path}", markup=False)
    return None


def verified(folder: Path, record: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        return print_json({"path": str(folder), "files": record["files"], "matches": True})
    method = record.get("method")
    how = f"merged by {method['name']}" if isinstance(method, dict) and "name" in method else "trained"
    out().print(f"{folder} matches its record: {len(record['files'])} files, {how}", markup=False)
    return None


def notes(found: Any) -> None:
    for note in found:
        err().print(f"note: {note}", markup=False)


def _weights(merge_weights: MergeWeights) -> None:
    """The numbers; and on a terminal, below them, where they can be seen at once, a strip a model."""
    console = out()
    numbers = _weights_table(merge_weights)
    watched = terminal_charts.watched(console)
    if not watched or console.measure(numbers).minimum <= console.width:
        console.print(numbers)
    if watched:
        if merge_weights.similarity is not None:
            console.print(
                "\n",
                terminal_charts.strips("similarity to the newest", merge_weights.table(merge_weights.similarity), console.width),
                sep="",
            )
        if len(merge_weights.models) > 1:
            even = 1 / len(merge_weights.models)
            console.print(
                "\n", terminal_charts.strips("weights", merge_weights.table(merge_weights.weights), console.width, middle=even), sep=""
            )


def _weights_table(merge_weights: MergeWeights) -> Any:
    from rich.table import Table

    names = [terminal_charts.plain(name) for name in merge_weights.models]
    table = Table("layer", *(f"w {name}" for name in names), box=None)
    if merge_weights.similarity is not None:
        for name in names[:-1]:
            table.add_column(f"S {name}")
    rows: list[tuple[int, int, list[str]]] = []  # first and last layer, and the numbers they share
    for layer, row in enumerate(merge_weights.weights.tolist()):
        similarity_rows = (
            merge_weights.similarity[layer].tolist()[:-1]
            if merge_weights.similarity is not None and layer < len(merge_weights.similarity)
            else []
        )
        numbers = [f"{number:.4f}" for number in (*row, *similarity_rows)]
        first = rows.pop()[0] if rows and rows[-1][2] == numbers else layer
        rows.append((first, layer, numbers))
    for first, last, numbers in rows:
        table.add_row(str(first) if first == last else f"{first} to {last}", *numbers)
    return table


def _rule(given: Any) -> Any:
    if isinstance(given, RecallWeights | LossWeights):
        return given.compares
    return {f"layer {layer}": list(row) for layer, row in enumerate(given)} if isinstance(given[0], tuple) else list(given)


def _words(name: str, value: Any) -> str:
    if name.startswith("bytes") or name == "memory":
        return f"{value / 1e6:,.1f} MB"
    if name == "seconds":
        return f"about {value:,.1f}"
    if isinstance(value, dict):
        return "\n".join(f"{key}: {inner}" for key, inner in value.items()) or "defaults"
    return str(value)
