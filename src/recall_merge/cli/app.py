"""The `recall` command: its subcommands, and how errors become messages and an exit status."""

from __future__ import annotations

import sys

import typer

from recall_merge.cli import bench, demo, evaluate, export, merge, methods, report, workspace
from recall_merge.cli.console import print_error
from recall_merge.runtime.errors import RecallError

app = typer.Typer(
    name="recall",
    help="Keep one language model that knows everything you ever fine-tuned into it: merge models by what they represent.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,  # an unforeseen error is shown as a plain traceback
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = (
    *(demo.demo, merge.merge, merge.plan, merge.weights, merge.stats, methods.methods),
    *(workspace.init, workspace.learn, workspace.status, workspace.rollback),
    *(evaluate.evaluate, bench.bench, report.report, export.export, export.verify),
)
for command in COMMANDS:
    app.command()(command)


def main() -> None:
    """Run the command. Every error that the library raises is printed; the exit status is 0 only on success."""
    try:
        app(prog_name="recall")
    except RecallError as error:
        print_error(error)
        sys.exit(1)
    except OSError as error:  # a full, broken or read-only disk, wherever it shows
        fix = "make room, or check the disk and its permissions; finished work is kept, and the same command continues from there"
        print_error(RecallError(f"the system reports: {error.strerror or error}", where=error.filename or "", fix=fix))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
