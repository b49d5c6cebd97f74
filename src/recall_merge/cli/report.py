"""`recall report`: the page of a workspace, a result or a bench."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recall_merge.cli.console import out as console
from recall_merge.cli.console import print_json, progress
from recall_merge.cli.options import AsJson, Quiet, ResultBase, ResultExperts, models_of, result_of
from recall_merge.runtime.errors import RunError
from recall_merge.runtime.paths import path_of
from recall_merge.runtime.progress import Progress, Silent

if TYPE_CHECKING:
    from collections.abc import Mapping

    from recall_merge.report.write import Report


def report(
    source: Annotated[Path, typer.Argument(metavar="PATH", help="A workspace, a result, or the results of a bench.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the report; PATH-report by default.")] = None,
    text: Annotated[bool, typer.Option("--text", help="Show the texts of samples, prompts and answers.")] = False,
    samples: Annotated[Path | None, typer.Option("--samples", "-s", help="Rows that a result's samples come from, for --text.")] = None,
    base: ResultBase = None,
    expert: ResultExperts = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a page about a merge, a workspace or a bench.

    It is one HTML file that needs no network; its charts are also saved as PNG and SVG.

    Example: recall report ws --text
    """
    from recall_merge.continual.state import is_workspace

    bars = progress(quiet or as_json)
    models = models_of(base, expert)
    if not is_workspace(source):
        source, models = result_of(source, base, expert)
    written = write(source, out=out, text=text, samples=samples, models=models, progress=bars)
    if as_json:
        return print_json({"page": str(written.page), "charts": [str(chart) for chart in written.charts]})
    return console().print(f"wrote {written.page}, and {len(written.charts) // 2} charts as PNG and SVG beside it")


def write(
    source: Path,
    *,
    out: Path | None = None,
    text: bool = False,
    samples: Path | None = None,
    models: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write the report of a workspace, a result or a bench, told apart by their files.

    Args:
        out: folder of the report, beside the source by default; an earlier report there is replaced.
        text: show the texts of samples, prompts and answers, as far as they are kept.
        samples: the rows that a result's typical samples come from, to show their texts.
        models: where 'base' and experts of a result are, if they are not where its record says.

    Raises:
        RecallError: with every fault; an earlier report then stays as it was.
    """
    from recall_merge.bench.page import bench_page, is_bench
    from recall_merge.continual.page import make_page
    from recall_merge.continual.state import is_workspace
    from recall_merge.files.record import RECORD
    from recall_merge.report.merge_page import result_page
    from recall_merge.report.write import write_report

    progress, source, out = progress or Silent(), path_of(source), None if out is None else path_of(out)
    if is_workspace(source):
        if models or samples is not None:
            raise RunError("a workspace already names its models and rows", where=source, fix="leave out --base, --expert and --samples")
        return write_report(source, out, lambda cache: make_page(source, text=text, cache=cache, progress=progress))
    if is_bench(source):
        if models or samples is not None or text:
            fix = "leave out --base, --expert, --samples and --text"
            raise RunError("a bench has no models or texts to show", where=source, fix=fix)
        return write_report(source, out, lambda _: bench_page(source))
    if (source / RECORD).is_file():
        return write_report(
            source,
            out,
            lambda cache: result_page(source, text=text, samples=samples, models=models or {}, cache=cache, progress=progress),
        )
    fix = "give the folder of a workspace, of a result of `recall merge`, or of the results of `recall bench`"
    raise RunError("there is nothing here that a report can show", where=source, fix=fix)
