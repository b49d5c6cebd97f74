"""Merge methods: pure functions (base, deltas, weights, *, options) -> merged tensor, found by name in `METHODS`.

To add one, write a function with the decorator `@method` in a module of this folder: every module here is imported.
"""

from importlib import import_module
from pkgutil import iter_modules

from recall_merge.maths.draws import Draws as Draws
from recall_merge.maths.methods.averages import ALIASES as ALIASES
from recall_merge.maths.methods.averages import Alias as Alias
from recall_merge.maths.methods.registry import METHODS as METHODS
from recall_merge.maths.methods.registry import Method as Method
from recall_merge.maths.methods.registry import method as method

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
