"""The `recall` command. Only here are errors of the library turned into words and an exit status."""

from __future__ import annotations

import atexit
import gc
import sys
from pathlib import Path
from typing import Annotated

import typer

from recall_merge.cli import bench, evaluate, export, report, workspace
from recall_merge.cli.options import (
    AsJson,
    Base,
    EngineName,
    ExpertFlags,
    MethodName,
    Quiet,
    RunFile,
    SamplesPath,
    Sets,
    Target,
    gather,
)
from recall_merge.runtime.errors import RecallError

app = typer.Typer(
    name="recall",
    help="Keep one language model that knows everything you ever fine-tuned into it: merge models by what they represent.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,  # a fault that we did not foresee is a plain traceback
    context_settings={"help_option_names": ["-h", "--help"]},
)
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the model that is there, as a whole.")]


@app.command()
def merge(
    run: RunFile = None,
    base: Base = None,
    expert: ExpertFlags = None,
    method: MethodName = None,
    samples: SamplesPath = None,
    out: Target = None,
    overwrite: Overwrite = False,
    executor: EngineName = "local",
    sets: Sets = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Merge a base and experts into one Hugging Face folder.

    Example: recall merge run.yaml --set options.temperature=0.5
    """
    from recall_merge.cli import show
    from recall_merge.cli.console import progress
    from recall_merge.merging.merge import merge as recipe
    from recall_merge.report.merge_charts import draw_weights

    told = gather(run, base=base, experts=expert, method=method, samples=samples, out=out, overwrite=overwrite, sets=sets)
    show.merged(recipe(told, executor=executor, progress=progress(quiet or as_json), draw=draw_weights), as_json=as_json, quiet=quiet)


@app.command()
def plan(
    run: RunFile = None,
    base: Base = None,
    expert: ExpertFlags = None,
    method: MethodName = None,
    samples: SamplesPath = None,
    out: Target = None,
    overwrite: Overwrite = False,
    sets: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Say everything that merge would check and do; write nothing.

    Example: recall plan run.yaml
    """
    from recall_merge.cli import show
    from recall_merge.merging.cost import estimate_time
    from recall_merge.merging.plan import make_plan

    told = gather(run, base=base, experts=expert, method=method, samples=samples, out=out, overwrite=overwrite, sets=sets)
    made = make_plan(told, download=False)
    show.planned(made, estimate_time(made), as_json=as_json)


@app.command()
def weights(
    run: RunFile = None,
    base: Base = None,
    expert: ExpertFlags = None,
    method: MethodName = None,
    samples: SamplesPath = None,
    sets: Sets = None,
    picture: Annotated[Path | None, typer.Option(help="Save a picture: .png, .svg or .html.", show_default=False)] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Similarity and weights by layer, without merging.

    Example: recall weights run.yaml --picture weights.png
    """
    from recall_merge.cli import show
    from recall_merge.cli.console import progress
    from recall_merge.merging.layerwise import compute_weights
    from recall_merge.merging.plan import make_plan

    told = gather(run, base=base, experts=expert, method=method, samples=samples, sets=sets)
    show.weighed(compute_weights(make_plan(told, writes=False), progress(quiet or as_json)), picture=picture, as_json=as_json, quiet=quiet)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="A method; all of them when left out.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """List the merge methods, or tell formula, source and options of one.

    Example: recall methods recall
    """
    from recall_merge.cli import show

    show.methods(name, as_json=as_json)


@app.command()
def stats(
    run: RunFile = None,
    base: Base = None,
    expert: ExpertFlags = None,
    samples: SamplesPath = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the input statistics; the expert's own by default.", show_default=False)
    ] = None,
    rank: Annotated[int, typer.Option(min=0, help="Directions kept of each moment.")] = 24,
    sets: Sets = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make the input statistics of the newest expert: what its layers read on its own typical samples. `aligned` merges by statistics; they hold no text.

    Example: recall stats --base base -e french=out/french -s french.jsonl
    """
    from recall_merge.cli import show
    from recall_merge.cli.console import progress
    from recall_merge.merging.statistics import make_statistics

    told = gather(run, base=base, experts=expert, method=None if run else "aligned", samples=samples, sets=sets)
    show.stats(make_statistics(told, rank=rank, folder=out, progress=progress(quiet or as_json)), as_json=as_json)


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="The folder of a result.", show_default=False)], as_json: AsJson = False) -> None:
    """Tell whether a result still matches its record.

    Example: recall verify merged
    """
    from recall_merge.cli import show
    from recall_merge.merging.verify import verify as recipe

    show.verified(folder, recipe(folder), as_json=as_json)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", "-o", help="Where the demo works; what is valid there is reused.")] = Path("demo"),
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """The whole loop on a real small language model: train experts, compare, merge, score. Minutes on two cores.

    Example: recall demo
    """
    from recall_merge.cli import show
    from recall_merge.cli.console import err, progress
    from recall_merge.demo.demo import demo as recipe

    console = err()
    say = (lambda words: None) if quiet or as_json else (lambda words: console.print(words, style="bold"))
    show.demo(recipe(folder, progress=progress(quiet or as_json), say=say), as_json=as_json)


for command in (*workspace.COMMANDS, evaluate.evaluate, bench.bench, export.export, report.report):
    app.command()(command)


def main() -> None:
    """Run the command; every fault that the library names is printed, and the exit status is 0 only on success."""
    gc.set_threshold(50_000)  # imports make a million objects that stay; a look at them with every 700 more is an eighth of the start
    atexit.register(gc.freeze)  # what is left ends with the process; a last look through all of it takes a fifth of a second
    try:
        app(prog_name="recall")
    except RecallError as error:
        from recall_merge.cli.console import report

        report(error)
        sys.exit(1)
    except OSError as error:  # a disk that is full, broken or read-only, wherever that was met
        from recall_merge.cli.console import report

        fix = "make room, or check disk and permissions; what was finished stands, and the same command goes on from there"
        report(RecallError(f"the system refuses: {error.strerror or error}", where=error.filename or "", fix=fix))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
