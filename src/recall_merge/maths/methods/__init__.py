"""Merge methods: pure functions (base, deltas, weights, *, options) -> merged tensor, found by name in `METHODS`.

To add one, write a function with the decorator `@method` in a module of this folder: every module here is imported.
"""

from importlib import import_module
from pkgutil import iter_modules

from recall_merge.maths.methods.averages import ALIASES, Alias
from recall_merge.maths.methods.registry import METHODS, Method, method
from recall_merge.maths.trimming import Draws

__all__ = ["ALIASES", "METHODS", "Alias", "Draws", "Method", "method"]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
