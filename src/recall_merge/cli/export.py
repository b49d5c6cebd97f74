"""`recall export`: the command, and what it says of what it wrote."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recall_merge.cli.options import AsJson, Quiet
from recall_merge.runtime.errors import Faults, RunError

if TYPE_CHECKING:
    from recall_merge.interop.adapter_export import ExportedAdapter


class Form(StrEnum):
    mergekit = "mergekit"
    adapter = "adapter"


def export(
    result: Annotated[Path, typer.Argument(help="The folder of a result.", show_default=False)],
    to: Annotated[Form, typer.Option(help="A run file for mergekit, or a LoRA for PEFT.", show_default=False)],
    rank: Annotated[int | None, typer.Option(min=1, help="Of an adapter's factors, at most; exact by default.", show_default=False)] = None,
    base: Annotated[
        str | None, typer.Option(help="The result's base, if the record does not tell where it is.", show_default=False)
    ] = None,
    expert: Annotated[
        list[str] | None, typer.Option("--expert", "-e", metavar="NAME=PATH", help="The same for an expert; repeat.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File or folder; beside the result by default.", show_default=False)
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a result in another tool's form. Its models are compared with its record first.

    Example: recall export merged --to adapter --rank 32 --base base
    """
    from recall_merge.cli.console import out as console
    from recall_merge.cli.console import progress
    from recall_merge.cli.show import print_json
    from recall_merge.interop.export import export_adapter, export_mergekit

    experts = experts_of(expert)
    if to is Form.mergekit:
        if rank is not None:
            raise RunError("--rank is an adapter's", fix="leave it out, or write --to adapter")
        made = export_mergekit(result, base=base, experts=experts, out=out, progress=progress(quiet or as_json))
        if as_json:
            return print_json({"path": str(made.path), "text": made.text})
        console().print(f"wrote {made.path}; it is run by: {made.text.splitlines()[0].removeprefix('# ')}", markup=False)
        return None
    adapter = export_adapter(result, rank=rank, base=base, experts=experts, out=out, progress=progress(quiet or as_json))
    return _show(adapter, as_json=as_json, quiet=quiet)


def experts_of(words: list[str] | None) -> dict[str, str]:
    faults, found = Faults(), {}
    for word in words or []:
        name, equals, path = word.partition("=")
        if not equals:
            faults.add(f"--expert {word}: no '=' in it", fix="write --expert NAME=PATH")
        found[name] = path
    faults.raise_any(RunError)
    return found


def _show(made: ExportedAdapter, *, as_json: bool, quiet: bool) -> None:
    from recall_merge.cli.show import notes, print_json

    if as_json:
        facts = {"error": made.error, "errors": made.errors, "ranks": dict(made.ranks), "whole": made.whole, "notes": made.notes}
        return print_json({"path": str(made.path)} | facts)
    from rich.table import Table

    from recall_merge.cli.console import out

    table = Table("layer", "relative error", box=None)
    for layer, error in enumerate(made.errors):
        table.add_row(str(layer), f"{error:.3g}")
    table.add_row("all", f"{made.error:.3g}")
    out().print(table)
    if not quiet:
        notes(made.notes)
    ranks = sorted(set(made.ranks.values()))
    words = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    out().print(f"wrote {made.path}: {len(made.ranks)} linear maps of rank {words}", markup=False)
    return None
