"""Libraries without what they import only because it is there. For processes of our own: what is left out is missing for all of one."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

UNUSED = ("scipy", "sklearn", "accelerate", "trio", "anyio")  # imported only because they are there
DECORATORS = ("allow_in_graph", "assume_constant_result", "disable", "mark_static_address")  # what transformers marks for the compiler


def import_transformers() -> None:
    """Import what all architectures need for a forward pass, in two thirds of the time.

    torch says that it cannot spread a model over processes, as some builds of it cannot, and its compiler is an empty package whose marks
    mark nothing. For answers that are asked for again, of the whole of transformers, where they are no.
    """
    sys.modules.update(dict.fromkeys(UNUSED))  # type: ignore[arg-type]  # None: not to be had
    import torch

    torch.distributed.is_available = lambda: False
    found = importlib.util.find_spec("torch._dynamo")
    compiler = ModuleType("torch._dynamo")
    compiler.__path__ = list(found.submodule_search_locations or ()) if found else []  # its modules can still be imported, one by one
    for name in DECORATORS:
        setattr(compiler, name, _unmarked)
    sys.modules[compiler.__name__] = torch._dynamo = compiler
    import transformers.modeling_utils  # noqa: F401

    torch.empty(1, device="meta").normal_()  # the first such call of a process imports sympy, and the model that is read will make it


def import_clustering() -> None:
    """Import scikit-learn's, without pandas: half of the time and of the memory. Its tables are then unknown to it."""
    if hidden := "pandas" not in sys.modules:
        sys.modules["pandas"] = None  # type: ignore[assignment]
    try:
        import sklearn.cluster  # noqa: F401
    finally:
        if hidden:
            del sys.modules["pandas"]


def _unmarked(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    """A decorator, with or without arguments, that gives back what it decorates."""
    return (lambda one: one) if function is None else function
