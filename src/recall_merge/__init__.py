"""recall-merge: one language model that keeps everything its owner ever fine-tuned into it.

The names below are loaded when first used, so that importing the package costs nothing.
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recall_merge.runtime.surroundings import settle

if TYPE_CHECKING:
    from recall_merge.bench.compare import Comparison as Comparison
    from recall_merge.evaluation.scores import Scores
    from recall_merge.files.statistics import InputStatistics
    from recall_merge.interop.push import Pushed as Pushed
    from recall_merge.interop.push import push as push
    from recall_merge.merging.layerwise import compute_weights as compute_weights
    from recall_merge.merging.merge import MergeResult as MergeResult
    from recall_merge.merging.plan import Plan as Plan
    from recall_merge.merging.run import MergeRun as MergeRun
    from recall_merge.merging.run import load_run as load_run
    from recall_merge.merging.verify import verify as verify
    from recall_merge.merging.weights import MergeWeights as MergeWeights
    from recall_merge.runtime.errors import RecallError as RecallError
    from recall_merge.runtime.progress import Progress

    Run = MergeRun | Mapping[str, Any] | str | PathLike[str]

settle()
_HOMES = {
    "MergeResult": "merging.merge",
    "MergeRun": "merging.run",
    "Plan": "merging.plan",
    "Pushed": "interop.push",
    "RecallError": "runtime.errors",
    "MergeWeights": "merging.weights",
    "load_run": "merging.run",
    "push": "interop.push",
    "verify": "merging.verify",
    "compute_weights": "merging.layerwise",
}
__all__ = [
    "MergeResult",
    "MergeRun",
    "MergeWeights",
    "Plan",
    "Pushed",
    "RecallError",
    "compare",
    "compute_weights",
    "evaluate",
    "load_run",
    "make_plan",
    "merge",
    "progress",
    "push",
    "stats",
    "verify",
]


def merge(run: "Run", *, executor: str = "local", progress: "Progress | None" = None) -> "MergeResult":
    """Merge as the run says, with a picture of the weights in the model card: `recall_merge.merging.merge.merge`.

    The run is a `MergeRun`, its keys and values, or the path of its file, ours or mergekit's.
    """
    from recall_merge.merging.merge import merge as merge_run
    from recall_merge.report.merge_charts import draw_weights

    return merge_run(_read(run), executor=executor, progress=progress, draw=draw_weights)


def compare(run: "Run", tasks: Sequence[str], **options: Any) -> "Comparison":
    """Merge the same experts in several ways and score each, in memory: `recall_merge.bench.compare.compare`."""
    from recall_merge.bench.compare import compare as compare_merges

    return compare_merges(_read(run), tasks, **options)


def stats(run: "Run", **options: Any) -> "InputStatistics":
    """Make the input statistics of a run's newest expert from the run's samples: `recall_merge.merging.statistics.make_statistics`."""
    from recall_merge.merging.statistics import make_statistics

    return make_statistics(_read(run), **options)


def evaluate(model: str | PathLike[str], tasks: Sequence[str], **options: Any) -> "Scores":
    """Score a model on tasks: `recall_merge.evaluation.evaluate.evaluate`."""
    from recall_merge.evaluation.evaluate import evaluate as evaluate_model

    return evaluate_model(str(model), tasks, **options)


def progress() -> "Progress":
    """What shows how far long work is: bars in the cell of a notebook, or on a terminal; nothing elsewhere."""
    from recall_merge.cli.console import progress as bars
    from recall_merge.runtime.notebook import NotebookBars, is_notebook

    return NotebookBars() if is_notebook() else bars()


def make_plan(run: "Run", *, writes: bool = True, download: bool = True) -> "Plan":
    """Check a run, given as for `merge`, against its files: `recall_merge.merging.plan.make_plan`."""
    from recall_merge.merging.plan import make_plan as plan_run

    return plan_run(_read(run), writes=writes, download=download)


def _read(run: "Run") -> "MergeRun":
    from recall_merge.interop.mergekit_run import load_any_run
    from recall_merge.merging.plan import all_faults, as_run

    if isinstance(run, str | PathLike):
        with all_faults():
            run = load_any_run(Path(run))
    return as_run(run)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("recall-merge")
    if name not in _HOMES:
        raise AttributeError(f"module 'recall_merge' has no attribute '{name}'")
    return getattr(import_module(f"recall_merge.{_HOMES[name]}"), name)
