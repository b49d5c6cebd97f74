"""`recall report`: the command, and what it says of what it wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recall_merge.cli.options import AsJson, Quiet


def report(
    source: Annotated[Path, typer.Argument(metavar="PATH", help="A workspace, a result, or a bench's results.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the report; PATH-report by default.", show_default=False)
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="Show the words of samples, prompts and answers, too.")] = False,
    samples: Annotated[
        Path | None, typer.Option("--samples", "-s", help="Rows that a result's samples come from, for --text.", show_default=False)
    ] = None,
    base: Annotated[str | None, typer.Option(help="A result's base, if the record does not tell where it is.", show_default=False)] = None,
    expert: Annotated[
        list[str] | None, typer.Option("--expert", "-e", metavar="NAME=PATH", help="The same for an expert; repeat.", show_default=False)
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write one HTML page that explains a merge, a workspace or a bench, and its charts as PNG and SVG. It needs no network.

    Example: recall report ws --text
    """
    from recall_merge.cli.console import out as console
    from recall_merge.cli.console import progress
    from recall_merge.cli.export import experts_of
    from recall_merge.cli.report_writer import report as recipe
    from recall_merge.cli.show import print_json

    made = recipe(source, out=out, text=text, samples=samples, base=base, experts=experts_of(expert), progress=progress(quiet or as_json))
    if as_json:
        return print_json({"page": str(made.page), "charts": [str(chart) for chart in made.charts]})
    console().print(f"wrote {made.page}, and {len(made.charts) // 2} charts as PNG and SVG beside it", markup=False)
    return None
