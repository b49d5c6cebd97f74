"""`recall methods`: the list of merge methods, and formula, source and options of one of them."""

from __future__ import annotations

from inspect import Parameter
from typing import Annotated, Any

import typer

from recall_merge.cli.console import out, print_json, table
from recall_merge.cli.options import AsJson
from recall_merge.runtime.errors import RunError, did_you_mean


def methods(
    name: Annotated[str | None, typer.Argument(help="A method; all of them by default.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the merge methods, or explain one of them.

    Example: recall methods recall
    """
    known = _descriptions()
    if name is not None and name not in known:
        raise RunError(f"there is no method '{name}'", fix=did_you_mean(name, known))
    if name is not None:
        return _show(name, *known[name], as_json=as_json)
    summaries = {method: (source, doc.splitlines()[0]) for method, (source, doc) in known.items()}
    if as_json:
        return print_json({method: {"source": source, "summary": summary} for method, (source, summary) in summaries.items()})
    rows = table("method", "what it does", "source")
    for method, (source, summary) in summaries.items():
        rows.add_row(method, summary, source)
    return out().print(rows)


def _descriptions() -> dict[str, tuple[str, str]]:
    """Source and docstring of each name that a run can give as its method."""
    from recall_merge.maths.methods import ALIASES, METHODS

    aliases = {name: (alias.source, alias.doc) for name, alias in ALIASES.items()}
    return aliases | {name: (method.source, method.doc) for name, method in METHODS.items() if name not in aliases}


def _show(name: str, source: str, doc: str, *, as_json: bool) -> None:
    from recall_merge.maths.methods import ALIASES
    from recall_merge.maths.methods.registry import explained
    from recall_merge.maths.similarity import KERNELS
    from recall_merge.merging.rules import WEIGHT_OPTIONS, method_named

    method, fields = method_named(name), WEIGHT_OPTIONS[ALIASES[name].weights].model_fields if name in ALIASES else {}
    assert method is not None
    kernels = KERNELS.values() if "kernel" in fields else ()
    if as_json:
        options = {key: str(parameter.default) for key, parameter in method.options.items()}
        weights = {key: (str(field.default), field.description or "") for key, field in fields.items()}
        facts = {"name": name, "source": source, "doc": doc, "options": options, "weights": weights}
        return print_json(facts | {"kernels": {kernel.name: {"source": kernel.source, "summary": kernel.summary} for kernel in kernels}})
    console = out()
    console.print(f"{name}\n\n{doc}\n\nsource: {source}")
    if fields:
        own = [explained(parameter) for parameter in method.options.values()]
        lines = [*own, *(explained(_parameter(key, field)) for key, field in fields.items())]
        console.print("\nOptions:\n" + "\n".join(f"    {line}" for line in lines))
        if kernels:
            console.print(
                "\nKernels:\n" + "\n".join(f"    {kernel.name}: {kernel.summary.rstrip('.')}; {kernel.source}" for kernel in kernels)
            )
        console.print(f"\nIt is short for `method: {method.name}` with `weights: {{{ALIASES[name].weights}: ...}}`.")
    return None


def _parameter(name: str, field: Any) -> Parameter:
    """A setting of the weights in the form of a method's option."""
    annotation = Annotated[field.annotation, *field.metadata, field.description]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation)
