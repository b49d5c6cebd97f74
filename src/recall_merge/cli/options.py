"""The options that commands share, and how a run is read from a file, flags and `--set`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recall_merge.runtime.errors import Faults, RunError
from recall_merge.runtime.paths import path_of
from recall_merge.runtime.safe_yaml import NotYaml, parse_yaml
from recall_merge.runtime.sections import assign, parse

if TYPE_CHECKING:
    from recall_merge.merging.run import MergeRun

RunFile = Annotated[Path | None, typer.Argument(metavar="RUN.yaml", help="A run file, or one of mergekit; or use the options.")]
Base = Annotated[str | None, typer.Option(help="Base: a folder, or a hub name with optional @revision.")]
Experts = Annotated[list[str] | None, typer.Option("--expert", "-e", metavar="NAME=PATH", help="An expert; repeat, newest last.")]
Method = Annotated[str | None, typer.Option("--method", "-m", help="One of `recall methods`.")]
Samples = Annotated[str | None, typer.Option("--samples", "-s", help="Rows of the newest expert's data.")]
Target = Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the result.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing result as a whole.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. seed=1; repeat.")]
KeepIf = Annotated[
    list[str] | None,
    typer.Option(metavar="TASK>=BOUND", help="Keep the model only if: a score (0.6), a change (-0.02), `all` for every task; repeat."),
]
Allowed = Annotated[
    list[str] | None,
    typer.Option("--allow-argument", metavar="NAME", help="Accept an argument of training that may do more than train; repeat."),
]
TemplateFile = Annotated[Path | None, typer.Option("--template", metavar="FILE", help="Jinja file, for the models' own chat template.")]
NoTemplate = Annotated[bool, typer.Option("--no-template", help="Apply no chat template: rows are texts as they are.")]
Executor = Annotated[str, typer.Option(help="Where the work runs: local, ray, or ray://ADDRESS.")]
Device = Annotated[
    str | None,
    typer.Option(help="Where models and heavy methods run: auto (the default), cpu, cuda, cuda:1, mps or xpu.", show_default=False),
]
ResultBase = Annotated[str | None, typer.Option(help="The result's base, if it is not where the record says.")]
ResultExperts = Annotated[
    list[str] | None, typer.Option("--expert", "-e", metavar="NAME=PATH", help="An expert that is not where the record says; repeat.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress and no notes.")]


def read_run(
    file: Path | None,
    *,
    base: str | None = None,
    experts: list[str] | None = None,
    method: str | None = None,
    samples: str | None = None,
    out: Path | None = None,
    overwrite: bool = False,
    device: str | None = None,
    sets: list[str] | None = None,
) -> MergeRun:
    """The run that a command is given by a file, by options, or by both; options override the file.

    Raises:
        RunError: with every fault of file and options.
    """
    from recall_merge.files.row_sources import RowSource
    from recall_merge.merging.plan import all_faults
    from recall_merge.merging.run import MergeRun

    flags = {"base": base, "method": method, "device": device, "out.path": out, "out.overwrite": overwrite or None}
    keys: dict[str, Any] = {key: value for key, value in flags.items() if value is not None}
    faults = Faults()
    with faults.collect():
        if experts:
            keys["experts"] = [{"name": name, "path": path} for name, path in pairs("--expert", "NAME=PATH", experts)]
    with faults.collect():
        keys |= settings_of(sets)
    with faults.collect():
        keys |= {f"samples.{key}": value for key, value in RowSource.of(samples).model_dump(exclude_unset=True).items()} if samples else {}
    faults.raise_any(RunError)
    if file is not None:
        from recall_merge.interop.mergekit_run import load_any_run

        with all_faults():
            return load_any_run(file, keys)
    if not keys:
        raise RunError("no run was given", fix="give a RUN.yaml, or --base, --expert, --method and --out")
    data: dict[str, Any] = {}
    for key, value in keys.items():
        assign(data, key, value)
    with all_faults():
        return parse(MergeRun, data, where="the command line")


def settings_of(words: list[str] | None) -> dict[str, Any]:
    """The values of `--set`, by dotted key.

    Raises:
        RunError: with every word that is not KEY=VALUE.
    """
    return dict(pairs("--set", "KEY=VALUE", words, read=parse_yaml))


def written_by(template: Path | None, no_template: bool) -> Path | bool | None:
    """What writes rows: a Jinja file, nothing (False), or what is the default (None).

    Raises:
        RunError: if both are asked for.
    """
    if template is not None and no_template:
        raise RunError("--template and --no-template are both given", fix="leave one of them out")
    return False if no_template else template


def words_of(listed: str | None) -> list[str]:
    """The words of a list with commas; within {} these belong to the word.

    >>> words_of("a,b={path: c, split: d},e")
    ['a', 'b={path: c, split: d}', 'e']
    """
    words, depth = [""], 0
    for letter in listed or "":
        depth += (letter == "{") - (letter == "}")
        words[-1:] = [words[-1], ""] if letter == "," and not depth else [words[-1] + letter]
    return [word for word in words if word]


def result_of(folder: Path, base: str | None, experts: list[str] | None) -> tuple[Path, dict[str, str]]:
    """The folder of a result, also where a workspace is given, and where its models are: as the workspace knows, or as was said."""
    from recall_merge.continual.state import merge_of

    result, known = merge_of(path_of(folder))
    return result, known | models_of(base, experts)


def models_of(base: str | None, experts: list[str] | None) -> dict[str, str]:
    """Where the models of a result are, by name: 'base', and the experts that were given."""
    return ({} if base is None else {"base": base}) | dict(pairs("--expert", "NAME=PATH", experts))


def pairs(option: str, form: str, words: list[str] | None, *, read: Callable[[str], Any] = str) -> list[tuple[str, Any]]:
    """The values of a repeated option of the form NAME=VALUE, each value read by `read`.

    Raises:
        RunError: with every word that is not of this form.
    """
    faults, named = Faults(), []
    for word in words or []:
        name, equals, text = word.partition("=")
        if not equals or not name:
            faults.add(f"{option} {word}: not of the form {form}", fix=f"write {option} {form}")
            continue
        try:
            named.append((name, read(text)))
        except NotYaml:
            faults.add(f"{option} {word}: the value is not YAML", fix="put text with special characters in quotes")
    faults.raise_any(RunError)
    return named
