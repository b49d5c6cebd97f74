"""`recall report`: what was asked for is told from its files; the page and its pictures are written whole, or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recall_merge.bench.page import bench_page, is_bench
from recall_merge.continual.items import Words
from recall_merge.continual.state import Stage, State, found_path, is_workspace
from recall_merge.files.checkpoint import open_checkpoint, read_json
from recall_merge.files.experts import hash_file
from recall_merge.files.hub import locate
from recall_merge.files.output import OutputFolder
from recall_merge.files.record import RECORD
from recall_merge.files.rows import read_rows
from recall_merge.files.statistics import has_statistics
from recall_merge.report.anatomy import Models, anatomy
from recall_merge.report.merge_page import MergeFacts, merge_page
from recall_merge.report.page import Page, render, save_figures
from recall_merge.runtime.errors import OutputError, RecallError, ResultError, RunError
from recall_merge.runtime.progress import Progress, Silent

PAGE, CHARTS, ANATOMY, ABOUT = "index.html", "charts", "anatomy.json", "report.json"


@dataclass(frozen=True)
class Report:
    """What was written: the page, and a PNG and an SVG of each of its charts."""

    page: Path
    charts: tuple[Path, ...]


def report(
    source: Path,
    *,
    out: Path | None = None,
    text: bool = False,
    samples: Path | None = None,
    base: str | None = None,
    experts: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write the report of a workspace, of a result, or of a bench's folder.

    Args:
        out: folder of the report, beside the source by default; one that is there is replaced if it is a report.
        text: show the words of samples, prompts and answers, as far as they are kept.
        samples: the rows that a result's typical samples come from, to show their text.
        base, experts: where the models of a result are, if they are not where its record says.

    Raises:
        RecallError: with every fault; what stood in the report's place stands as it was.
    """
    target = (out or source.absolute().with_name(f"{source.absolute().name}-report")).absolute()
    _check_place(target, source)
    with OutputFolder(target, overwrite=True) as folder:
        if (target / ANATOMY).is_file():
            shutil.copyfile(target / ANATOMY, folder.path / ANATOMY)
        page = _page(source, text, samples, base, dict(experts or {}), folder.path / ANATOMY, progress or Silent())
        (folder.path / PAGE).write_text(render(page), "utf-8")
        charts = save_figures(page.figures, folder.path / CHARTS)
        about = {"title": page.title, "page": PAGE, "charts": [str(chart.relative_to(folder.path)) for chart in charts]}
        (folder.path / ABOUT).write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", "utf-8")
        folder.commit()
    return Report(target / PAGE, tuple(target / CHARTS / chart.name for chart in charts))


def _page(
    source: Path, text: bool, samples: Path | None, base: str | None, experts: dict[str, str], keep: Path, progress: Progress
) -> Page:
    if is_workspace(source):
        if base is not None or experts or samples is not None:
            raise RunError("a workspace knows its models and rows", where=source, fix="leave out --base, --expert and --samples")
        return _workspace(source, text, keep, progress)
    if is_bench(source):
        if base is not None or experts or samples is not None or text:
            raise RunError("a bench has no models or words to show", where=source, fix="leave out --base, --expert, --samples and --text")
        return bench_page(source)
    if (source / RECORD).is_file():
        return _result(source, text, samples, base, experts, keep, progress)
    fix = "give the folder of a workspace, of a result of `recall merge`, or of the results of `recall bench`"
    raise RunError("there is nothing here to report of", where=source, fix=fix)


def _workspace(folder: Path, text: bool, keep: Path, progress: Progress) -> Page:
    from recall_merge.continual.page import workspace_page
    from recall_merge.continual.workspace import status

    found = status(folder)
    if not found.state.stages:
        raise RunError("nothing was learnt here yet", where=folder, fix=f"recall learn {folder} --task NAME --train FILE --test FILE")
    merge = None
    if found.state.head:
        stage = found.state.stages[found.state.head - 1]
        place = found_path(folder, stage.merged.path)
        if (place / RECORD).is_file():
            merge = _stage_merge(folder, found.state, stage, place, text, keep, progress)
    return workspace_page(folder, found, merge, Words(text))


def _stage_merge(folder: Path, state: State, stage: Stage, place: Path, text: bool, keep: Path, progress: Progress) -> MergeFacts:
    record = read_json(place / RECORD)
    lineage = {one.task.name: one for one in state.lineage(stage.id)}
    names = [entry["name"] for entry in record["run"]["experts"]]
    models: dict[str, Path] = {}
    statistics: dict[str, Path] = {}
    lacking = ""
    for name in names:
        one = lineage.get(name)
        if one is None or (one.start == "last" and one.parent):
            lacking = f"'{name}' is not an expert on the base, so its change to the base is not at hand"
        elif not (path := locate(one.expert.path).folder if one.expert.on_hub else found_path(folder, one.expert.path)).is_dir():
            lacking = f"the expert '{name}' is missing"
        else:
            models[name] = path
            if one.stats is not None and has_statistics(found_path(folder, one.stats)):
                statistics[name] = found_path(folder, one.stats)
    base = locate(state.base.path).folder if state.base.on_hub else found_path(folder, state.base.path)
    tables = {} if lacking else anatomy(place, Models(base, models, statistics), keep, progress)
    texts = {}
    if (
        text
        and stage.train is not None
        and (rows := found_path(folder, stage.train.path)).is_file()
        and hash_file(rows) == stage.train.sha256
    ):
        texts = _texts(rows, stage.samples)
    return MergeFacts(record, open_checkpoint(place).nbytes, tables, lacking, texts)


def _result(
    folder: Path, text: bool, samples: Path | None, base: str | None, experts: dict[str, str], keep: Path, progress: Progress
) -> Page:
    from recall_merge.merging.result import check_model, find_models, open_result

    result = open_result(folder)
    given = {**({"base": base} if base is not None else {}), **experts}
    tables: Mapping[str, Any] = {}
    lacking = ""
    try:
        found = find_models(result, ["base", *result.experts], given)
    except RecallError as error:
        if given:
            raise
        lacking = f"{error.faults[0].what}; {' '.join(fault.fix for fault in error.faults)} shows it"
    else:
        places = {name: place.folder for name, place in found.items() if not isinstance(place, str)}
        for name, place in places.items():
            check_model(result, name, place)
        statistics = {
            entry["name"]: Path(entry["stats"]) for entry in result.run["experts"] if entry.get("stats") and Path(entry["stats"]).is_dir()
        }
        statistics |= {name: place for name, place in places.items() if name != "base" and name not in statistics and has_statistics(place)}
        tables = anatomy(folder, Models(places["base"], {name: places[name] for name in result.experts}, statistics), keep, progress)
    texts: Mapping[int, str] = {}
    if text and result.record["samples"]:
        if samples is None:
            raise RunError("a result does not keep the text of its samples", where=folder, fix="give --samples FILE, or leave out --text")
        if hash_file(samples) != result.record["rows_sha256"]:
            raise ResultError("these are not the rows that the samples were chosen from", where=samples, fix="give the run's own file")
        texts = _texts(samples, [one["row"] for one in result.record["samples"]])
    facts = MergeFacts(result.record, result.checkpoint.nbytes, tables, lacking, texts)
    return merge_page(facts, folder.absolute().resolve().name)


def _texts(file: Path, wanted: Any) -> dict[int, str]:
    words, chosen = Words(True), set(wanted)
    return {row.index: words.cut(f"{row.plain}\n{row.completion}".strip()) for row in read_rows(file) if row.index in chosen}


def _check_place(target: Path, source: Path) -> None:
    if source.absolute().resolve().is_relative_to(target.resolve()):
        raise OutputError("the report would lie over what it tells of", where=target, fix="choose another folder for --out")
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / ABOUT).is_file())):
        raise OutputError("something that is no report lies in its place", where=target, fix="choose another folder for --out")
