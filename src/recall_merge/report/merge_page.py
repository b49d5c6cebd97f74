"""The page of one merge: similarity and merge weights, what the deltas have in common, the typical samples, and the cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recall_merge.files.hub import Located
from recall_merge.files.row_sources import RowSource
from recall_merge.maths.layers import find_layers
from recall_merge.merging.result import Result, check_model, find_models, open_result
from recall_merge.merging.rules import make_rules
from recall_merge.merging.run import MergeRun, RecallWeights
from recall_merge.report import merge_charts as charts
from recall_merge.report.anatomy import Models, anatomy
from recall_merge.report.page import Block, Figure, Page, Section, Table, Text
from recall_merge.report.words import sample_texts
from recall_merge.runtime.errors import RecallError, ResultError, RunError
from recall_merge.runtime.progress import Progress
from recall_merge.runtime.sections import parse

PARTS = {"weights": "samples, hidden states, weights", "merge": "merging the parameters", "check": "checking the result"}


@dataclass(frozen=True)
class MergeFacts:
    """What a merge's page shows."""

    record: Mapping[str, Any]
    nbytes: int  # of the result's weights
    tables: Mapping[str, Any] = field(default_factory=dict)  # of `anatomy`; empty if a model was not found
    lacking: str = ""  # which model was not found, and how to give it
    texts: Mapping[int, str] = field(default_factory=dict)  # of the typical samples, by row, if they were asked for


def result_page(folder: Path, *, text: bool, samples: Path | None, models: Mapping[str, str], cache: Path, progress: Progress) -> Page:
    """The page of a result.

    Args:
        text: show the texts of the typical samples.
        samples: the rows that they were chosen from.
        models: where 'base' and experts are, if not where the record says.
        cache: keeps what was read from the models' weights.

    Raises:
        RecallError: if the result, or a file or model given for it, is not what the record says.
    """
    result = open_result(folder, shown=True)
    tables: Mapping[str, Any] = {}
    lacking = ""
    try:
        located = find_models(result, ["base", *result.experts], models)
    except RecallError as error:
        if models:
            raise
        lacking = f"{error.faults[0].what}; {', '.join(fault.fix for fault in error.faults)} to see them"
    else:
        folders = {name: place.folder for name, place in located.items() if isinstance(place, Located)}
        for name, path in folders.items():
            check_model(result, name, path)
        experts = {name: folders[name] for name in result.experts}
        tables = anatomy(folder, Models(folders["base"], experts, _statistics_folders(result, experts)), cache, progress)
    texts = _texts(result, samples) if text and result.record["samples"] else {}
    facts = MergeFacts(result.record, result.checkpoint.nbytes, tables, lacking, texts)
    return merge_page(facts, folder.absolute().resolve().name)


def _statistics_folders(result: Result, experts: Mapping[str, Path]) -> dict[str, Path]:
    """Where an expert's input statistics may be: in the folder that the run names, or else in the expert's own."""
    named = {entry["name"]: Path(entry["stats"]) for entry in result.run["experts"] if entry.get("stats")}
    return {**experts, **{name: path for name, path in named.items() if path.is_dir()}}


def _texts(result: Result, samples: Path | None) -> dict[int, str]:
    if samples is None:
        fix = "give --samples FILE, or leave out --text"
        raise RunError("a result does not keep the texts of its samples", where=result.folder, fix=fix)
    described = {key: value for key, value in result.run["samples"].items() if key in RowSource.model_fields}
    source = RowSource.model_validate({**described, "path": str(samples)})
    rows = source.read()
    if source.digest(rows) != result.record["rows_sha256"]:
        raise ResultError("these are not the rows that the samples were chosen from", where=samples, fix="give the run's own file")
    return sample_texts(rows, {sample["row"] for sample in result.record["samples"]})


def merge_page(facts: MergeFacts, title: str) -> Page:
    """The page of a result."""
    record, experts = facts.record, [entry["name"] for entry in facts.record["run"]["experts"]]
    subject = f"base {record['run']['base']}; experts {', '.join(experts)}; made {record['created']}"
    return Page(f"Merge: {title}", subject, lede(record), list(merge_sections(facts)), about(record))


def merge_sections(facts: MergeFacts, prefix: str = "") -> Iterator[Section]:
    """The sections of one merge. `prefix` distinguishes the names of several merges on a page."""
    record = facts.record
    yield Section(f"{prefix}layers", "Similarity and merge weights by layer", [_weights_figure(record, prefix)])
    if explored := _explore(record, prefix):
        yield Section(f"{prefix}explore", "Explore other weights from the same similarity", explored)
    yield Section(f"{prefix}changes", "What the experts changed, and what the merge keeps", list(_changes(facts, prefix)))
    if record["samples"]:
        yield Section(f"{prefix}samples", "Typical samples", [_samples(facts)])
    yield Section(f"{prefix}cost", "What it cost", [_cost(facts)])


def lede(record: Mapping[str, Any]) -> list[str]:
    """The main findings, as sentences made from the numbers."""
    weights, names = record["weights"], record["weights"]["experts"]
    experts = _listed([entry["name"] for entry in record["run"]["experts"]])
    sentences = [f"{experts} on one base, merged by {record['method']['name']}."]
    newest = [row[-1] for row in weights["rows"]]
    if len(names) > 1 and max(newest) - min(newest) > 5e-4:
        strongest = newest.index(max(newest))
        sentences.append(
            f"The weight of the newest expert, {names[-1]}, lies between {min(newest):.3f} and {max(newest):.3f}; an even share is"
            f" {1 / len(names):.3f}. It is largest at layer {strongest} of {weights['layers'][-1]}."
        )
    elif len(names) > 1:
        shares = ", ".join(f"{name} {value:.3f}" for name, value in zip(names, weights["rows"][0], strict=True))
        sentences.append(f"All layers have the same weights: {shares}.")
    if (similarity := record.get("similarity")) and len(names) > 1:
        means = [sum(column) / len(column) for column in list(zip(*similarity["rows"], strict=True))[:-1]]
        nearest, farthest = means.index(max(means)), means.index(min(means))
        words = f"On the newest expert's samples, {names[nearest]} is most similar to it (mean similarity {means[nearest]:.3f})"
        sentences.append(words + (f", {names[farthest]} least ({means[farthest]:.3f})." if nearest != farthest else "."))
    return sentences + [note for note in record["notes"] if "method" in note]


def about(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The essentials of the record."""
    facts = [("method", record["method"]["name"]), ("source", record["method"]["source"])]
    facts += [(f"option {key}", str(value)) for key, value in record["method"]["options"].items()]
    facts += [("seed", str(record["run"]["seed"])), ("made", record["created"])]
    return facts + [(name, version) for name, version in record["versions"].items()]


def _weights_figure(record: Mapping[str, Any], prefix: str) -> Figure:
    similarity, weights = record.get("similarity"), record["weights"]
    says = "The weights of a layer sum to 1. Choose a model in the legend to make it stand out."
    if similarity:
        says = (
            "Above: how similar each model's hidden states of the typical samples are to the newest expert's. Below: the weights that"
            f" follow; orange is more than an even share, violet less. Point at a layer of the first map to mark it in all. {says}"
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
    try:
        rule = make_rules(parse(MergeRun, dict(record["run"]), where="record.json")).weights
    except RecallError:  # written by a version with other options
        return []
    if not isinstance(rule, RecallWeights) or not record.get("similarity"):
        return []
    says = (
        "Move a slider to compute the weights again from the stored similarity, here in the page. Nothing is merged: for a model with"
        " other weights, merge again."
    )
    if rule.kernel == "rbf":
        says += " At c times the bandwidth, S becomes S^(1/c²); this is exact if all samples of a layer are equally far apart."
    if rule.ablation != "none":
        says += f" The merge itself used the ablation '{rule.ablation}' instead of these weights."
    similarity = record["similarity"]
    title, chart = "Weights for another temperature, bandwidth and lambda", charts.explore(similarity, rule.model_dump())
    key = "options" if record["method"]["name"] == "recall" else "weights.recall"
    command = f"recall merge RUN.yaml --set {key}.temperature=0.5 --set {key}.bandwidth=1.0 --set options.scale=1.5 --set out.path=again"
    return [
        _figure(f"{prefix}explore-weights", title, says, chart, similarity),
        Text("For such a model, merge again. There, the bandwidth is a rule, or a number in the units of the hidden states:"),
        Text(command, is_code=True),
    ]


def _changes(facts: MergeFacts, prefix: str) -> Iterator[Block]:
    tables, record = facts.tables, facts.record
    if not tables:
        yield Text(f"What the experts changed is not shown: {facts.lacking}.")
    else:
        says = "Frobenius norm of each delta, relative to the norm of the base, over all merged tensors of a layer."
        chart = charts.lines(tables["sizes"], "size", "|delta| / |base|", log=True, last_is_merge=True)
        yield _figure(f"{prefix}delta-sizes", "Size of each delta by layer", says, chart, tables["sizes"])
        if tables["cosines"]["experts"]:
            says = "Near 0, the experts changed different directions; above 0 they agree, below 0 they oppose each other."
            chart = charts.delta_cosines(tables["cosines"])
            yield _figure(f"{prefix}delta-cosines", "Do the deltas agree? Cosine by layer", says, chart, tables["cosines"])
        if tables["missed"]["experts"]:
            says = (
                "From the experts' input statistics: the squared distance between the outputs of merge and expert on the expert's typical"
                " inputs, divided by that between base and expert. 0: the merge answers as the expert does; 1: as far off as the base."
            )
            chart = charts.lines(tables["missed"], "missed", "share missed")
            yield _figure(f"{prefix}missed", "What the merge misses of each expert, by layer", says, chart, tables["missed"])
    if condition := record.get("statistics", {}).get("condition"):
        says = (
            "A bound on the condition number of the solved systems, for the worst tensor of each layer; at 1e16, float64 loses all digits."
        )
        table = _worst_by_layer(condition, record["weights"]["layers"][-1] - 1)
        chart = charts.lines(table, "condition", "at most", log=True)
        yield _figure(f"{prefix}condition", "Conditioning of the solved systems, by layer", says, chart, table, form=".3g")


def _figure(name: str, title: str, says: str, chart: Any, table: Mapping[str, Any], form: str = ".4f") -> Figure:
    rows = [[str(layer), *_numbers(row, form)] for layer, row in zip(table["layers"], table["rows"], strict=True)]
    return Figure(name, title, says, chart, ["layer", *table["experts"]], rows)


def _worst_by_layer(condition: Mapping[str, float], blocks: int) -> dict[str, Any]:
    """The largest condition number of each layer, as a table with one column."""
    layers = find_layers(condition, blocks)
    worst: dict[int, float] = {}
    for name, value in condition.items():
        worst[layers.of(name)] = max(value, worst.get(layers.of(name), 0.0))
    numbers = sorted(worst)
    return {"experts": ["worst tensor"], "layers": numbers, "rows": [[worst[layer]] for layer in numbers]}


def _samples(facts: MergeFacts) -> Table:
    samples = sorted(facts.record["samples"], key=lambda sample: -sample["cluster"])
    head = ["row", "tokens", "rows in its cluster"]
    rows = [[str(sample["row"] + 1), str(sample["tokens"]), str(sample["cluster"])] for sample in samples]
    caption = "Rows of the newest expert's data that the models were compared on, by the size of their clusters"
    if not facts.texts:
        return Table(f"{caption}; --text shows their texts", head, rows)
    texts = [facts.texts.get(sample["row"], "-") for sample in samples]
    return Table(caption, [*head, "text"], [[*row, text] for row, text in zip(rows, texts, strict=True)])


def _cost(facts: MergeFacts) -> Table:
    record = facts.record
    rows = [[PARTS.get(part, part), f"{seconds:,.1f} s"] for part, seconds in record["seconds"].items()]
    sizes = {"weights read": record.get("bytes", {}).get("read"), "weights written": facts.nbytes}
    sizes["peak memory of the process, from its start to the end of the merge"] = record.get("peak_memory")
    rows.append(["in all", f"{sum(record['seconds'].values()):,.1f} s"])
    rows += [[what, f"{size / 1e6:,.1f} MB"] for what, size in sizes.items() if size is not None]
    return Table("Time, bytes and memory of this merge", ["part", "cost"], rows)


def _numbers(row: Sequence[float | None], form: str = ".4f") -> list[str]:
    return ["-" if value is None else format(value, form) for value in row]


def _listed(names: Sequence[str]) -> str:
    """
    >>> _listed(["a"]), _listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
