"""The page of one merge: what is similar where, which model rules which layer, how large the changes are, and what it cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from recall_merge.merging.run import MergeRun, RecallWeights
from recall_merge.report import merge_charts as charts
from recall_merge.report.page import Block, Code, Figure, Page, Section, Table, Text
from recall_merge.runtime.errors import RecallError
from recall_merge.runtime.sections import parse

PARTS = {
    "weights": "samples, representations, weights",
    "merge": "the pass over the parameters",
    "check": "loading and checking the result",
}


@dataclass(frozen=True)
class MergeFacts:
    """What a merge's page shows.

    Attributes:
        record: the result's.
        tables: of `anatomy`; empty where its models were not found, and `lacking` says what to give then.
        texts: typical samples by their rows, where words were asked for.
        nbytes: the result's weights.
    """

    record: Mapping[str, Any]
    nbytes: int
    tables: Mapping[str, Any] = field(default_factory=dict)
    lacking: str = ""
    texts: Mapping[int, str] = field(default_factory=dict)


def merge_page(facts: MergeFacts, title: str) -> Page:
    """The page of a result."""
    sections = list(merge_sections(facts))
    return Page(f"Merge: {title}", _subject(facts.record), lede(facts.record), sections, about(facts.record))


def merge_sections(facts: MergeFacts, prefix: str = "") -> Iterator[Section]:
    """The parts of a page that speak of one merge. `prefix` keeps names of several merges on a page apart."""
    record = facts.record
    yield Section(f"{prefix}layer", "What is similar where, and who rules which layer", [_weights_figure(record, prefix)])
    if explored := _explore(record, prefix):
        yield Section(f"{prefix}explore", "Explore: other weights from the same similarity", explored)
    yield Section(f"{prefix}changes", "What the experts changed, and what the merge kept", list(_changes(facts, prefix)))
    if record["samples"]:
        yield Section(f"{prefix}samples", "Typical samples", [_samples(facts)])
    yield Section(f"{prefix}cost", "What it cost", [_cost(facts)])


def lede(record: Mapping[str, Any]) -> list[str]:
    """What a reader should take away, in sentences made from the numbers."""
    weights, names = record["weights"], record["weights"]["experts"]
    found = [f"{_listed([e['name'] for e in record['run']['experts']])} on one base, merged by {record['method']['name']}."]
    newest = [row[-1] for row in weights["rows"]]
    if len(names) > 1 and max(newest) - min(newest) > 5e-4:
        strongest = newest.index(max(newest))
        found.append(
            f"The newest, {names[-1]}, weighs {min(newest):.3f} to {max(newest):.3f}, where an even share is {1 / len(names):.3f};"
            f" it weighs most at layer {strongest} of {weights['layers'][-1]}."
        )
    elif len(names) > 1:
        shares = ", ".join(f"{name} {value:.3f}" for name, value in zip(names, weights["rows"][0], strict=True))
        found.append(f"All layers have the same weights: {shares}.")
    if (similarity := record.get("similarity")) and len(names) > 1:
        mean = [sum(row[place] for row in similarity["rows"]) / len(similarity["rows"]) for place in range(len(names) - 1)]
        nearest, farthest = mean.index(max(mean)), mean.index(min(mean))
        words = f"On the newest expert's samples, {names[nearest]} represents most alike (mean similarity {mean[nearest]:.3f})"
        found.append(words + (f", {names[farthest]} least ({mean[farthest]:.3f})." if nearest != farthest else "."))
    found += [note for note in record["notes"] if "method" in note]
    return found


def about(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The record's essentials."""
    facts = [("method", record["method"]["name"]), ("source", record["method"]["source"])]
    facts += [(f"option {key}", str(value)) for key, value in record["method"]["options"].items()]
    facts += [("seed", str(record["run"]["seed"])), ("made", record["created"])]
    return facts + [(name, version) for name, version in record["versions"].items()]


def representations_of(record: Mapping[str, Any]) -> RecallWeights | None:
    """How the weights came from representations; None where they were given."""
    from recall_merge.merging.rules import make_rules

    try:
        rule = make_rules(parse(MergeRun, dict(record["run"]), where="record.json")).weights
    except RecallError:  # a record of a version that knew other options
        return None
    return rule if isinstance(rule, RecallWeights) else None


def _subject(record: Mapping[str, Any]) -> str:
    return (
        f"base {record['run']['base']}; experts {', '.join(entry['name'] for entry in record['run']['experts'])}; made {record['created']}"
    )


def _weights_figure(record: Mapping[str, Any], prefix: str) -> Figure:
    similarity, weights = record.get("similarity"), record["weights"]
    says = "The weights of a layer sum to 1. Choose a model in the legend to make it stand out."
    if similarity:
        says = (
            "Above, how alike each model represents the typical samples to the newest one; below, the weights that follow: orange is more"
            f" than an even share, violet less. Point at a layer of the first map to mark it in all. {says}"
        )
    head = ["layer", *(f"w {name}" for name in weights["experts"])]
    head += [f"S {name}" for name in similarity["experts"]] if similarity else []
    similarity_rows = dict(zip(similarity["layers"], similarity["rows"], strict=True)) if similarity else {}
    rows = [
        [str(layer), *_numbers(row), *_numbers(similarity_rows.get(layer, [None] * (len(head) - 1 - len(row))))]
        for layer, row in zip(weights["layers"], weights["rows"], strict=True)
    ]
    title = "Similarity and weights by layer" if similarity else "Weights by layer"
    return Figure(f"{prefix}weights", title, says, charts.similarity_and_weights(similarity, weights), head, rows)


def _explore(record: Mapping[str, Any], prefix: str) -> list[Block]:
    rule = representations_of(record)
    if rule is None or not record.get("similarity"):
        return []
    says = (
        "Move a slider: the weights are computed again from the stored similarity, here in the page. Nothing is merged:"
        " for a model with other weights, merge again."
    )
    if rule.kernel == "rbf":
        says += " c times the bandwidth takes S to S^(1/c²), exactly so where a layer's samples all lie equally far apart."
    if rule.ablation != "none":
        says += f" The merge itself used the ablation '{rule.ablation}' in place of these weights."
    similarity = record["similarity"]
    chart = charts.explore(similarity, rule.model_dump())
    rows = [[str(layer), *_numbers(row)] for layer, row in zip(similarity["layers"], similarity["rows"], strict=True)]
    head = ["layer", *(f"S {name}" for name in similarity["experts"])]
    where = "options" if record["method"]["name"] == "recall" else "weights"
    command = (
        f"recall merge RUN.yaml --set {where}.temperature=0.5 --set {where}.bandwidth=1.0 --set options.scale=1.5 --set out.path=again"
    )
    return [
        Figure(f"{prefix}explore-weights", "Weights for another temperature, bandwidth and lambda", says, chart, head, rows),
        Text("To have such a model, merge again; the bandwidth is given there in the units of the hidden states, or as a rule:"),
        Code(command),
    ]


def _changes(facts: MergeFacts, prefix: str) -> Iterator[Block]:
    tables, record = facts.tables, facts.record
    if not tables:
        yield Text(f"How large the changes are and how they agree is not shown: {facts.lacking}.")
    else:
        says = "Frobenius norm of what was added to the base, over the norm of the base, all merged tensors of a layer together."
        yield _figure(f"{prefix}delta-sizes", "Size of each change by layer", says, charts.delta_sizes, tables["sizes"])
        if tables["cosines"]["experts"]:
            says = "Near 0: the experts changed different things. Above 0 they agree, below 0 they pull against each other."
            yield _figure(f"{prefix}delta-cosines", "Do the changes agree? Cosine by layer", says, charts.delta_cosines, tables["cosines"])
        if tables["missed"]["experts"]:
            says = (
                "From the experts' statistics: the squared distance between what the merge and the expert answer on the expert's typical inputs,"
                " over that between base and expert. 0: the merge answers as the expert; 1: it is as far from it as the base."
            )
            yield _figure(f"{prefix}missed", "What the merge misses of each expert", says, charts.residuals, tables["missed"])
    condition = record.get("statistics", {}).get("condition")
    if condition:
        by_layer = _worst_by_layer(condition, record)
        layers, worst = list(by_layer), list(by_layer.values())
        says = (
            "A bound of the condition number of the systems that were solved, the worst tensor of each layer; in float64, 1e16 loses all."
        )
        rows = [[str(layer), f"{value:.3g}"] for layer, value in by_layer.items()]
        yield Figure(
            f"{prefix}condition", "Conditioning of the aligned layers", says, charts.conditions(layers, worst), ["layer", "at most"], rows
        )


def _figure(name: str, title: str, says: str, draw: Any, table: Mapping[str, Any]) -> Figure:
    rows = [[str(layer), *_numbers(row)] for layer, row in zip(table["layers"], table["rows"], strict=True)]
    return Figure(name, title, says, draw(table), ["layer", *table["experts"]], rows)


def _worst_by_layer(condition: Mapping[str, float], record: Mapping[str, Any]) -> dict[int, float]:
    from recall_merge.maths.layers import find_layers

    blocks = record["weights"]["layers"][-1] - 1
    layers = find_layers(condition, blocks)
    worst: dict[int, float] = {}
    for name, value in condition.items():
        worst[layers.of(name)] = max(value, worst.get(layers.of(name), 0.0))
    return dict(sorted(worst.items()))


def _samples(facts: MergeFacts) -> Table:
    samples = facts.record["samples"]
    head = ["row", "tokens", "rows it stands for", *(["text"] if facts.texts else [])]
    rows = [
        [str(one["row"]), str(one["tokens"]), str(one["cluster"]), *([facts.texts.get(one["row"], "-")] if facts.texts else [])]
        for one in sorted(samples, key=lambda one: -one["cluster"])
    ]
    words = "" if facts.texts else "; ask for their text with --text"
    return Table(f"Rows of the newest expert's data that were compared, by the size of their clusters{words}", head, rows)


def _cost(facts: MergeFacts) -> Table:
    record = facts.record
    rows = [[PARTS.get(part, part), f"{seconds:,.1f} s"] for part, seconds in record["seconds"].items()]
    known = record.get("bytes", {})
    rows.append(["all of it", f"{sum(record['seconds'].values()):,.1f} s"])
    rows += [["weights read", f"{known['read'] / 1e6:,.1f} MB"]] if "read" in known else []
    rows.append(["weights written", f"{facts.nbytes / 1e6:,.1f} MB"])
    if "peak_memory" in record:
        rows.append(["memory of the process at most, from its start to the merge's end", f"{record['peak_memory'] / 1e6:,.1f} MB"])
    return Table("Time, bytes and memory of this merge", ["part", "cost"], rows)


def _numbers(row: Sequence[float | None]) -> list[str]:
    return ["-" if value is None else f"{value:.4f}" for value in row]


def _listed(names: Sequence[str]) -> str:
    """
    >>> _listed(["a"]), _listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
