"""`recall methods`: the list of merge methods, and formula, source and options of one of them."""

from __future__ import annotations

from inspect import Parameter
from typing import Annotated

import typer

from recall_merge.cli.console import out, print_json, table
from recall_merge.cli.options import AsJson
from recall_merge.runtime.errors import RunError, did_you_mean


def methods(name: Annotated[str | None, typer.Argument(help="A method; all of them by default.")] = None, as_json: AsJson = False) -> None:
    """List the merge methods, or explain one of them.

    Example: recall methods recall
    """
    from recall_merge.maths.methods import ALIASES, METHODS

    entries = {**ALIASES, **METHODS}
    if name is not None and name not in entries:
        raise RunError(f"there is no method '{name}'", fix=did_you_mean(name, entries))
    if name is not None:
        return _explain(name, as_json=as_json)
    if as_json:
        return print_json({entry.name: {"source": entry.source, "summary": entry.doc.splitlines()[0]} for entry in entries.values()})
    rows = table("method", "what it does", "source")
    for entry in entries.values():
        rows.add_row(entry.name, entry.doc.splitlines()[0], entry.source)
    return out().print(rows)


def _explain(name: str, *, as_json: bool) -> None:
    from recall_merge.maths.methods import ALIASES, METHODS
    from recall_merge.maths.methods.registry import explained
    from recall_merge.maths.similarity import KERNELS
    from recall_merge.merging.rules import WEIGHT_OPTIONS

    alias = ALIASES.get(name)
    entry, method = alias or METHODS[name], METHODS[alias.method if alias else name]
    fields = WEIGHT_OPTIONS[alias.weights].model_fields if alias else {}
    kernels = KERNELS.values() if "kernel" in fields else ()
    if as_json:
        options = {key: str(parameter.default) for key, parameter in method.options.items()}
        weights = {key: (str(field.default), field.description or "") for key, field in fields.items()}
        summaries = {kernel.name: {"source": kernel.source, "summary": kernel.summary} for kernel in kernels}
        facts = {"name": name, "source": entry.source, "doc": entry.doc, "options": options, "weights": weights}
        return print_json(facts | {"kernels": summaries})
    lines = [name, "", f"{entry.doc}{method.options_doc if alias else ''}"]
    for key, field in fields.items():
        annotation = Annotated[field.annotation, *field.metadata, field.description]
        lines.append(f"    {explained(Parameter(key, Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation))}")
    lines += ["", "Kernels:"] if kernels else []
    lines += [f"    {kernel.name}: {kernel.summary.rstrip('.')}; {kernel.source}" for kernel in kernels]
    lines += ["", f"Source: {entry.source}"]
    lines += [f"Short for `method: {method.name}` with `weights: {{{alias.weights}: ...}}`."] if alias else []
    return out().print("\n".join(lines), soft_wrap=False)
