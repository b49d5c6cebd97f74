"""From words of the command line to a run: a file, flags, and `--set`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from recall_merge.runtime.errors import Faults, RunError

RunFile = Annotated[
    Path | None, typer.Argument(metavar="[RUN.yaml]", help="The run, or a run file of mergekit; or give it by flags.", show_default=False)
]
Base = Annotated[str | None, typer.Option(help="Base: a folder, or a hub name with optional @revision.", show_default=False)]
ExpertFlags = Annotated[
    list[str] | None, typer.Option("--expert", "-e", metavar="NAME=PATH", help="An expert; repeat, newest last.", show_default=False)
]
MethodName = Annotated[str | None, typer.Option("--method", "-m", help="One of `recall methods`.", show_default=False)]
SamplesPath = Annotated[str | None, typer.Option("--samples", "-s", help="Rows of the newest expert's data.", show_default=False)]
Target = Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the result.", show_default=False)]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the run, e.g. options.temperature=0.5.", show_default=False),
]
EngineName = Annotated[str, typer.Option(help="Where the work is done: local, ray, or ray://ADDRESS.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result for machines.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")]


def gather(
    file: Path | None,
    *,
    base: str | None = None,
    experts: list[str] | None = None,
    method: str | None = None,
    samples: str | None = None,
    out: Path | None = None,
    overwrite: bool = False,
    sets: list[str] | None = None,
) -> Any:
    """The run that a command was given.

    Raises:
        RunError: with every fault of file and flags.
    """
    from recall_merge.merging.run import MergeRun
    from recall_merge.runtime.sections import parse

    faults = Faults()
    given: dict[str, Any] = {}
    if base is not None:
        given["base"] = base
    if experts:
        entries = [entry.partition("=") for entry in experts]
        for name, equals, _ in entries:
            if not equals:
                faults.add(f"--expert {name}: no '=' in it", fix="write --expert NAME=PATH")
        given["experts"] = [{"name": name, "path": path} for name, _, path in entries]
    given |= {key: value for key, value in {"method": method, "samples.path": samples, "out.path": out}.items() if value is not None}
    if overwrite:
        given["out.overwrite"] = True
    with faults.collect():
        given |= settings_of(sets)
    faults.raise_any(RunError)
    if file is not None:
        from recall_merge.interop.mergekit_run import load_any_run

        return load_any_run(file, given)
    if not given:
        raise RunError("no run was given", fix="give a RUN.yaml, or --base, --expert, --method and --out")
    data: dict[str, Any] = {}
    from recall_merge.runtime.sections import assign

    for key, value in given.items():
        assign(data, key, value)
    return parse(MergeRun, data, where="the command line")


def settings_of(words: list[str] | None) -> dict[str, Any]:
    """The settings of `--set`, by their dotted keys.

    Raises:
        RunError: with every word that is none.
    """
    faults, found = Faults(), {}
    for word in words or []:
        with faults.collect():
            key, value = _setting(word)
            found[key] = value
    faults.raise_any(RunError)
    return found


def _setting(word: str) -> tuple[str, Any]:
    from recall_merge.runtime.safe_yaml import NotYaml, parse_yaml

    key, equals, text = word.partition("=")
    if not equals or not key:
        raise RunError(f"--set {word}: not of the form KEY=VALUE", fix="write e.g. --set options.temperature=0.5")
    try:
        return key, parse_yaml(text)
    except NotYaml as error:
        raise RunError(f"--set {word}: the value is not YAML", fix="put text with special characters in quotes") from error
