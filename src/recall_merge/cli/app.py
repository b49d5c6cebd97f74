"""The `recall` command: its subcommands, and how errors become messages and an exit status."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

import recall_merge
from recall_merge.cli import bench, compare, demo, evaluate, export, merge, methods, report, workspace
from recall_merge.cli.console import err, out, print_error
from recall_merge.runtime.errors import RecallError, is_out_of_memory
from recall_merge.runtime.paths import check_text

app = typer.Typer(
    name="recall",
    help="Keep one language model that knows everything you ever fine-tuned into it: merge models by what they represent.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,  # an unforeseen error is shown as a plain traceback
    context_settings={"help_option_names": ["-h", "--help"]},
)
INTERRUPTED = 130  # the exit status, typer's too, after Ctrl-C
GOES_ON = "finished work is kept, and the same command goes on from there"
NO_MEMORY = """error: the memory that this process may have is used up; finished work is kept
  fix: give it more (ulimit, the container), or fewer threads; `recall plan` says what a run takes
"""
STOPPED = {
    "merge": "nothing was written, and what stood in the result's place is as it was: the same command begins again",
    "learn": "finished steps and the training's last checkpoint are kept: `recall learn WORKSPACE` goes on from there",
    "compare": "nothing was written: the same command begins again",
    "push": "the repository shows nothing of it, and what has arrived is kept: the same command goes on from there",
    "evaluate": "no scores were written: the same command begins again",
    "bench": GOES_ON,
    "demo": GOES_ON,
}
"""What is kept of a command that is stopped by Ctrl-C, and how to go on."""
COMMANDS = (
    *(demo.demo, merge.merge, merge.plan, merge.weights, merge.stats, methods.methods),
    *(workspace.init, workspace.learn, workspace.status, workspace.rollback),
    *(evaluate.evaluate, compare.compare, bench.bench, report.report, export.export, export.push, export.verify),
)


def _show_version(wanted: bool) -> None:
    if wanted:
        out().print(f"recall-merge {recall_merge.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)] = False,
) -> None:
    """Options of `recall` itself."""


for command in COMMANDS:
    app.command()(command)


def main() -> None:
    """Run the command. Every error that the library raises is printed; the exit status is 0 only on success."""
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by whoever started the command
            setattr(sys, stream, Path(os.devnull).open("w"))  # noqa: SIM115
    try:
        for word in sys.argv[1:]:
            check_text(word)
        app(prog_name="recall")
    except Exception as error:
        if is_out_of_memory(error):
            sys.stderr.write(NO_MEMORY)  # by hand: what prints errors may not fit either
        elif (told := _in_words(error)) is not None:
            print_error(told)
        else:  # one that nobody foresaw: its words may be those of a file
            err().print(traceback.format_exc(), end="")
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, SystemExit) and end.code != INTERRUPTED:
            raise
        words = next((STOPPED[word] for word in sys.argv[1:] if word in STOPPED), "nothing was written")
        print_error(RecallError(f"stopped; {words}"))
        sys.exit(INTERRUPTED)


def _in_words(error: Exception) -> RecallError | None:
    """An error as the library's own; None for one that is a fault of ours."""
    if isinstance(error, RecallError):
        return error
    if isinstance(error, OSError):  # a full, broken or read-only disk, wherever it shows
        fix = "make room, or check the disk and its permissions; finished work is kept, and the same command continues from there"
        return RecallError(f"the system reports: {error.strerror or error}", where=error.filename or "", fix=fix)
    return None
