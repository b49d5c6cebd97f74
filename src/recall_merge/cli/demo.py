"""`recall demo`: the command, and how its scores and answers are printed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recall_merge.cli.console import err, out, print_json, progress, table
from recall_merge.cli.options import AsJson, Quiet

if TYPE_CHECKING:
    from recall_merge.demo.demo import DemoResult


def demo(
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder of the demo; what is already done there is reused.")] = Path("demo"),
    small: Annotated[bool, typer.Option("--small", help="A tenth of the rows, in a folder `small`: shows that everything runs.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run the whole loop on a small real model, in minutes.

    It trains experts, compares their hidden states, merges them, and scores the result. With --small it takes few rows, and its
    scores are no result.

    Example: recall demo
    """
    from recall_merge.demo.demo import demo

    say = (lambda words: None) if quiet or as_json else (lambda words: err().print(words, style="bold"))
    result = demo(folder, small=small, progress=progress(quiet or as_json), say=say)
    if as_json:
        print_json({"small": small, **_json(result)})
    else:
        _show(result)
        if small:
            out().print("the small demo shows that everything runs: with so few rows and steps, its scores are no result")


def _json(result: DemoResult) -> dict[str, object]:
    return {
        "merged": str(result.merged.path),
        "picture": str(result.picture),
        "scores": {
            model: {task: {"score": s.score, "stderr": s.stderr, "n": s.n} for task, s in row.items()}
            for model, row in result.scores.items()
        },
        "answers": [asdict(answer) for answer in result.answers],
        "reused": list(result.reused),
    }


def _show(result: DemoResult) -> None:
    console, names = out(), [task.name for task in result.tasks]
    scores = table("model", *names, "mean")
    for model, row in result.scores.items():
        numbers = [row[name] for name in names]
        shown = [f"{s.score:.2f} ± {s.stderr or 0:.2f}" for s in numbers]
        scores.add_row(f"expert {model}" if model in names else model, *shown, f"{sum(s.score for s in numbers) / len(numbers):.3f}")
    console.print("\n", scores, sep="")
    row = next(iter(result.scores.values()))
    tasks = ", ".join(f"{task.name} = {task.kind}, {row[task.name].n} rows, {row[task.name].metric}" for task in result.tasks)
    console.print(f"scores on test rows, ± standard error: {tasks}")
    for answer in result.answers:
        console.print(f"\nquestion: {answer.question}\n   right: {answer.right}")
        for model, words in answer.said.items():
            console.print(f"   {model}: {' '.join(words.split())}")
    console.print()
    if result.reused:
        console.print("kept from an earlier run, unchanged: " + ", ".join(result.reused))
    console.print(f"picture of RECALL's similarity and weights: {result.picture}\nthe merged model: {result.merged.path}")
