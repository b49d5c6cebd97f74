"""recall-merge: one language model that keeps everything its owner ever fine-tuned into it.

The names below are loaded when first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recall_merge.config import MergeRun as MergeRun
    from recall_merge.config import load_run as load_run
    from recall_merge.errors import RecallError as RecallError
    from recall_merge.recipes.merge import MergeResult as MergeResult
    from recall_merge.recipes.merge import merge as merge
    from recall_merge.recipes.plan import Plan as Plan
    from recall_merge.recipes.plan import make_plan as make_plan
    from recall_merge.recipes.verify import verify as verify
    from recall_merge.recipes.weigh import Weighting as Weighting
    from recall_merge.recipes.weigh import weigh as weigh

_HOMES = {
    "MergeResult": "recipes.merge",
    "MergeRun": "config",
    "Plan": "recipes.plan",
    "RecallError": "errors",
    "Weighting": "recipes.weigh",
    "load_run": "config",
    "make_plan": "recipes.plan",
    "merge": "recipes.merge",
    "verify": "recipes.verify",
    "weigh": "recipes.weigh",
}
__all__ = [
    "MergeResult",
    "MergeRun",
    "Plan",
    "RecallError",
    "Weighting",
    "load_run",
    "make_plan",
    "merge",
    "verify",
    "weigh",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("recall-merge")
    if name not in _HOMES:
        raise AttributeError(f"module 'recall_merge' has no attribute '{name}'")
    return getattr(import_module(f"recall_merge.{_HOMES[name]}"), name)
