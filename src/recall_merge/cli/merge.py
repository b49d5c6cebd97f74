"""The commands of one merge: merge, plan, weights, stats; and how their results are printed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recall_merge.cli import terminal_charts
from recall_merge.cli.console import out as console
from recall_merge.cli.console import print_json, print_notes, progress, table
from recall_merge.cli.options import (
    AsJson,
    Base,
    Device,
    Executor,
    Experts,
    Method,
    Overwrite,
    Quiet,
    RunFile,
    Samples,
    Sets,
    Target,
    read_run,
)

if TYPE_CHECKING:
    from recall_merge.merging.cost import Estimate
    from recall_merge.merging.plan import Plan
    from recall_merge.merging.weights import MergeWeights


def merge(
    run: RunFile = None,
    base: Base = None,
    expert: Experts = None,
    method: Method = None,
    samples: Samples = None,
    out: Target = None,
    overwrite: Overwrite = False,
    executor: Executor = "local",
    device: Device = None,
    sets: Sets = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Merge a base and experts into one Hugging Face folder.

    Example: recall merge run.yaml --set options.temperature=0.5
    """
    from recall_merge import merge

    options: dict[str, Any] = {"out": out, "overwrite": overwrite, "device": device, "sets": sets}
    merge_run = read_run(run, base=base, experts=expert, method=method, samples=samples, **options)
    result = merge(merge_run, executor=executor, progress=progress(quiet or as_json))
    if as_json:
        return print_json({"path": str(result.path), "record": result.record})
    if not quiet:
        _print_weights(result.merge_weights)
        print_notes(result.notes)
    return console().print(f"merged by {result.record['method']['name']} into {result.path}")


def plan(
    run: RunFile = None,
    base: Base = None,
    expert: Experts = None,
    method: Method = None,
    samples: Samples = None,
    out: Target = None,
    overwrite: Overwrite = False,
    device: Device = None,
    sets: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Show everything that merge would check and do; write nothing.

    Example: recall plan run.yaml
    """
    from recall_merge.merging.cost import estimate_time
    from recall_merge.merging.plan import make_plan

    options: dict[str, Any] = {"out": out, "overwrite": overwrite, "device": device, "sets": sets}
    merge_run = read_run(run, base=base, experts=expert, method=method, samples=samples, **options)
    merge_plan = make_plan(merge_run, download=False)
    facts = _plan_facts(merge_plan, estimate_time(merge_plan))
    if as_json:
        return print_json(facts)
    rows = table(show_header=False)
    for name, value in facts.items():
        if name != "notes":
            rows.add_row(LABELS.get(name, name.replace("_", " ")), _in_words(name, value))
    console().print(rows)
    print_notes(merge_plan.notes)
    return console().print("no faults found; nothing was written. The time is estimated from a short probe of this machine.")


def weights(
    run: RunFile = None,
    base: Base = None,
    expert: Experts = None,
    method: Method = None,
    samples: Samples = None,
    device: Device = None,
    sets: Sets = None,
    picture: Annotated[Path | None, typer.Option(help="Also save a picture: .png, .svg or .html.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show similarity and merge weights by layer, without merging.

    Example: recall weights run.yaml --picture weights.png
    """
    from recall_merge.merging.layerwise import compute_weights
    from recall_merge.merging.plan import make_plan

    merge_run = read_run(run, base=base, experts=expert, method=method, samples=samples, device=device, sets=sets)
    result = compute_weights(make_plan(merge_run, writes=False), progress(quiet or as_json))
    tables = _tables(result)
    if picture is not None:
        from recall_merge.report.merge_charts import draw_weights

        draw_weights(tables["similarity"], tables["weights"], picture)
    if as_json:
        rows = [{"row": sample.row, "tokens": sample.tokens, "cluster": sample.cluster} for sample in result.samples]
        return print_json({**tables, "samples": rows, "notes": list(result.notes)})
    _print_weights(result)
    if not quiet:
        print_notes(result.notes)
    return None if picture is None else console().print(f"picture: {picture}")


def stats(
    run: RunFile = None,
    base: Base = None,
    expert: Experts = None,
    samples: Samples = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the statistics; the expert's own by default.")] = None,
    rank: Annotated[int, typer.Option(min=0, help="Directions to keep of each second moment.")] = 24,
    device: Device = None,
    gradients: Annotated[
        bool,
        typer.Option("--gradients", help="Add gradients, which `fisher` takes, by passes back through the whole expert."),
    ] = False,
    sets: Sets = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compute the newest expert's input statistics, with one of its layers in memory at a time.

    They are the second moments of its layers' inputs on its own typical samples, and contain no text. `aligned` and `regmean` use them.

    Example: recall stats --base base -e french=out/french -s french.jsonl
    """
    from recall_merge.merging.cost import estimate_statistics, statistics_memory
    from recall_merge.merging.plan import make_plan
    from recall_merge.merging.statistics import apply

    method = None if run else "aligned"
    merge_run = read_run(run, base=base, experts=expert, method=method, samples=samples, device=device, sets=sets)
    statistics_plan = make_plan(merge_run, writes=False)
    if not (quiet or as_json):
        estimate = estimate_statistics(statistics_plan, rank, gradients=gradients)
        pool = {"rows": estimate.rows, "seconds": estimate.pool}
        choosing = f" (to choose among {_in_words('pool', pool)})" if estimate.rows else ""
        memory = _in_words("memory", statistics_memory(statistics_plan, gradients=gradients))
        console().print(f"{_in_words('seconds', estimate.seconds)}{choosing}, and {memory} of memory")
    statistics = apply(statistics_plan, rank=rank, gradients=gradients, folder=out, progress=progress(quiet or as_json))
    facts = {key: value for key, value in statistics.facts.items() if key != "tensors"}
    count = len(statistics.facts["tensors"])
    if as_json:
        return print_json({"path": str(statistics.folder), "bytes": statistics.nbytes, "tensors": count, **facts})
    size = f"{statistics.nbytes / 1e6:.1f} MB for {count} linear layers"
    source = f"{facts['samples']} typical samples, {facts['tokens']} tokens"
    console().print(f"wrote input statistics into {statistics.folder}: {size}, from {source}; they contain no text")
    return None if quiet else print_notes(facts["notes"])


def _tables(merge_weights: MergeWeights) -> dict[str, Any]:
    """Similarity and weights in the form of `record.json`."""
    similarity = None if merge_weights.similarity is None else merge_weights.table(merge_weights.similarity)
    return {"similarity": similarity, "weights": merge_weights.table(merge_weights.weights)}


def _print_weights(merge_weights: MergeWeights) -> None:
    """The numbers, and on a terminal also a strip of bars per model. Numbers that are too wide for the terminal are left out."""
    screen, numbers = console(), _numbers(merge_weights)
    if not terminal_charts.is_watched(screen):
        return screen.print(numbers)
    if screen.measure(numbers).minimum <= screen.width:
        screen.print(numbers)
    tables, count = _tables(merge_weights), len(merge_weights.models)
    if tables["similarity"] is not None:
        screen.print("\n", terminal_charts.strips("similarity to the newest", tables["similarity"], screen.width), sep="")
    if count > 1:
        screen.print("\n", terminal_charts.strips("weights", tables["weights"], screen.width, middle=1 / count), sep="")
    return None


def _numbers(merge_weights: MergeWeights) -> Any:
    """Weights and similarity of each layer."""
    names = [terminal_charts.plain(name) for name in merge_weights.models]
    compared = names[:-1] if merge_weights.similarity is not None else []
    rows = table("layer", *(f"w {name}" for name in names), *(f"S {name}" for name in compared))
    for label, weights, similarity in merge_weights.lines():
        rows.add_row(label, *(f"{number:.4f}" for number in (*weights, *similarity)))
    return rows


LABELS = {"seconds": "time", "memory": "peak memory", "memory_of_weights": "peak memory of `recall weights`"}
"""Rows of `recall plan` that are not named as in its JSON."""


def _plan_facts(plan: Plan, estimate: Estimate) -> dict[str, Any]:
    from recall_merge.merging.cost import device_memory, passes, peak_memory, weights_memory
    from recall_merge.merging.placement import work_on
    from recall_merge.merging.run import SampleWeights

    rule: Any = plan.weights
    work = work_on(plan.device, plan.method, rule)
    if isinstance(rule, SampleWeights):
        weights = rule.compares
    elif isinstance(rule[0], tuple):
        weights = {f"layer {layer}": list(row) for layer, row in enumerate(rule)}
    else:
        weights = list(rule)
    facts = {
        "base": plan.run.base,
        "experts": {expert.name: str(plan.located[expert.name].folder) for expert in plan.experts},
        "method": plan.name,
        "options": dict(plan.options),
        "weights": weights,
        "blocks": plan.base.layers.blocks,
        "tensors": len(plan.specs),
        "shards": len(plan.shards),
        "passes": passes(plan),
        "device": ": ".join(filter(None, [str(plan.device), " and ".join(work)])),
        "bytes_to_download": plan.bytes_to_download,
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "memory": peak_memory(plan),
        **({"memory_of_weights": weights_memory(plan)} if isinstance(rule, SampleWeights) else {}),  # of `recall weights`
        **({"memory_of_device": device_memory(plan)} if work else {}),
        "seconds": round(estimate.seconds, 1),
        **({"pool": {"rows": estimate.rows, "seconds": round(estimate.pool, 1)}} if estimate.rows else {}),
        "notes": plan.notes,
    }
    return facts | ({"weights_options": rule.model_dump()} if isinstance(rule, SampleWeights) else {})


def _in_words(name: str, value: Any) -> str:
    if name.startswith(("bytes", "memory")):
        return f"{value / 1e6:,.1f} MB"
    if name == "seconds":
        return f"about {value:,.1f} s"
    if name == "pool":
        rows, seconds = value["rows"], value["seconds"]
        fewer = f"; with `samples.pool: {rows // 10}` about {seconds / 10:,.0f} s" if seconds > 600 else ""
        return f"{rows:,} rows: about {seconds:,.1f} s of it{fewer}"
    if isinstance(value, dict):
        return "\n".join(f"{key}: {inner}" for key, inner in value.items()) or "defaults"
    return str(value)
