"""A report's folder: the page and its charts as PNG and SVG, written whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from recall_merge.files.output import OutputFolder, beside
from recall_merge.report.page import Page, render, save_figures
from recall_merge.runtime.errors import OutputError

PAGE, CHARTS, ANATOMY, ABOUT = "index.html", "charts", "anatomy.json", "report.json"


@dataclass(frozen=True)
class Report:
    """What was written: the page, and each of its charts as PNG and as SVG."""

    page: Path
    charts: tuple[Path, ...]


def write_report(source: Path, out: Path | None, make_page: Callable[[Path], Page]) -> Report:
    """Write the report of a folder.

    Args:
        out: the report's folder, SOURCE-report by default; an earlier report there is replaced.
        make_page: makes the page; its argument is a file that keeps from report to report what was read from the models' weights.

    Raises:
        RecallError: with every fault; an earlier report then stays as it was.
    """
    target = (out or beside(source, "-report")).absolute()
    if source.absolute().resolve().is_relative_to(target.resolve()):
        what = "the report would overwrite the folder that it describes"
        raise OutputError(what, where=target, fix="choose another folder for --out")
    place = OutputFolder(target, overwrite=True, kind="report")
    place.check({})
    with place as folder:
        if (target / ANATOMY).is_file():
            shutil.copyfile(target / ANATOMY, folder.path / ANATOMY)
        page = make_page(folder.path / ANATOMY)
        (folder.path / PAGE).write_text(render(page), "utf-8")
        charts = save_figures(page.figures, folder.path / CHARTS)
        about = {"title": page.title, "page": PAGE, "charts": [str(chart.relative_to(folder.path)) for chart in charts]}
        (folder.path / ABOUT).write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", "utf-8")
        folder.commit()
    return Report(target / PAGE, tuple(target / CHARTS / chart.name for chart in charts))
