"""`recall export`, `recall push` and `recall verify`: what can be done with a finished result."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recall_merge.cli.console import out as console
from recall_merge.cli.console import print_json, print_notes, progress, table
from recall_merge.cli.options import AsJson, Quiet, ResultBase, ResultExperts, result_of
from recall_merge.runtime.errors import RunError

if TYPE_CHECKING:
    from recall_merge.interop.adapter_export import ExportedAdapter
    from recall_merge.interop.push import Pushed

ResultFolder = Annotated[Path, typer.Argument(help="The folder of a result, or a workspace: its model now.")]


class Form(StrEnum):
    mergekit = "mergekit"
    adapter = "adapter"


def export(
    result: ResultFolder,
    to: Annotated[Form, typer.Option(help="A run file for mergekit, or a LoRA adapter for PEFT.")],
    rank: Annotated[int | None, typer.Option(min=1, help="Highest rank of an adapter; exact by default.")] = None,
    base: ResultBase = None,
    expert: ResultExperts = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File or folder; beside the result by default.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Convert a result to a run file of mergekit, or to an adapter. Its models are first compared with its record.

    Example: recall export merged --to adapter --rank 32 --base base
    """
    from recall_merge.interop.export import export_adapter, export_mergekit

    (result, models), bars = result_of(result, base, expert), progress(quiet or as_json)
    if to is Form.adapter:
        return _show(export_adapter(result, rank=rank, models=models, out=out, progress=bars), as_json=as_json, quiet=quiet)
    if rank is not None:
        raise RunError("--rank is only for adapters", fix="leave it out, or write --to adapter")
    run = export_mergekit(result, models=models, out=out, progress=bars)
    if as_json:
        return print_json({"path": str(run.path), "text": run.text})
    return console().print(f"wrote {run.path}; run it with: {run.text.splitlines()[0].removeprefix('# ')}")


def push(
    result: ResultFolder,
    repo: Annotated[str, typer.Argument(metavar="ORG/NAME", help="The repository on the hub; it is made if it is not there.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public, or accept one that is.")] = False,
    revision: Annotated[str, typer.Option(metavar="BRANCH", help="Branch; it is made if it is not there.")] = "main",
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="Message of the commit.")] = None,
    license: Annotated[str | None, typer.Option(metavar="NAME", help="Licence for the model card, such as apache-2.0.")] = None,
    base_model: Annotated[str | None, typer.Option(metavar="ORG/NAME", help="The base's name on the hub, for the model card.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Accept files there that no record of ours names.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Ask the hub, say what would be done, and change nothing.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Upload a result and its model card to the Hugging Face hub, private by default. It is first compared with its record.

    Example: recall push merged me/merged --license apache-2.0 --base-model org/base
    """
    from recall_merge.interop.push import push

    folder, _ = result_of(result, None, None)
    pushed = push(
        *(folder, repo),
        public=public,
        revision=revision,
        message=message,
        license=license,
        base_model=base_model,
        overwrite=overwrite,
        dry_run=dry_run,
        progress=progress(quiet or as_json),
    )
    if as_json:
        return print_json(asdict(pushed))
    return _show_push(pushed, quiet=quiet)


def verify(folder: ResultFolder, as_json: AsJson = False) -> None:
    """Check whether a result still matches its record.

    Example: recall verify merged
    """
    from recall_merge.merging.verify import verify

    folder, _ = result_of(folder, None, None)
    record = verify(folder)
    if as_json:
        return print_json({"path": str(folder), "files": record["files"], "matches": True})
    method = record.get("method")
    how = f"merged by {method['name']}" if isinstance(method, dict) and "name" in method else "trained"
    return console().print(f"{folder} matches its record: {len(record['files'])} files, {how}")


def _show(adapter: ExportedAdapter, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        facts = {"error": adapter.error, "errors": adapter.errors, "ranks": dict(adapter.ranks), "whole": adapter.whole}
        return print_json({"path": str(adapter.path), **facts, "notes": adapter.notes})
    rows = table("layer", "relative error")
    for layer, error in enumerate(adapter.errors):
        rows.add_row(str(layer), f"{error:.3g}")
    rows.add_row("all", f"{adapter.error:.3g}")
    console().print(rows)
    if not quiet:
        print_notes(adapter.notes)
    low, high = min(adapter.ranks.values()), max(adapter.ranks.values())
    ranks = str(low) if low == high else f"{low} to {high}"
    return console().print(f"wrote {adapter.path}: {len(adapter.ranks)} linear layers of rank {ranks}")


def _show_push(pushed: Pushed, *, quiet: bool) -> None:
    from rich.filesize import decimal

    make, upload, delete = ("would make", "would upload", "would delete") if pushed.dry_run else ("made", "uploaded", "deleted")
    place, lines = f"{pushed.repo}, branch {pushed.revision} ({'private' if pushed.private else 'public'})", list[str]()
    if pushed.created:
        lines.append(f"{make} {place}")
    if pushed.files:
        names = f": {', '.join(pushed.files)}" if pushed.dry_run else ""
        lines.append(f"{upload} {len(pushed.files)} files, {decimal(pushed.bytes)}, to {place}{names}")
    if pushed.deleted:
        lines.append(f"{delete} {', '.join(pushed.deleted)} of the earlier result")
    if not pushed.changes:
        lines.append(f"{place} holds this result already")
    lines.append("nothing was changed" if pushed.dry_run else f"commit {pushed.commit}: {pushed.url}")
    if not quiet:
        print_notes(pushed.notes)
    console().print("\n".join(lines))
