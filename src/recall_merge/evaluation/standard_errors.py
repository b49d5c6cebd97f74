"""Standard errors of scores over the items of a task.

The one place that uses private parts of sacrebleu: `Metric._extract_corpus_statistics` and `Metric._compute_score_from_stats`, which split
a corpus score into counts per sentence that add up. So a thousand draws cost a thousand sums, not a thousand passes over the texts.
Checked with sacrebleu 2.6 (tests/test_dependencies.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from recall_merge.evaluation.scoring import METRICS, Pair, columns, make_sacrebleu

if TYPE_CHECKING:
    import numpy as np

DRAWS = 1000


def mean_stderr(scores: Sequence[float]) -> float | None:
    """Standard error of a mean: sqrt( sum (x - mean)^2 / (n - 1) / n ); None for a single item.

    >>> mean_stderr([1, 0, 1, 0])    # sqrt(1 / 3 / 4)
    0.28867513459481287
    """
    n = len(scores)
    if n < 2:
        return None
    mean = sum(scores) / n
    return (sum((score - mean) ** 2 for score in scores) / (n - 1) / n) ** 0.5


def corpus_stderr(metric: str, pairs: Sequence[Pair]) -> float | None:
    """Standard error of a metric of a whole corpus: the standard deviation of the score over `DRAWS` draws of as many items, with
    replacement and a fixed seed. None for a single item.
    """
    import numpy as np

    n = len(pairs)
    if n < 2:
        return None
    score = _score_of_rows(metric, pairs)
    rng = np.random.default_rng(0)
    return float(np.std([score(rng.integers(n, size=n)) for _ in range(DRAWS)], ddof=1)) / 100


def _score_of_rows(metric: str, pairs: Sequence[Pair]) -> Callable[[np.ndarray], float]:
    """A function from the numbers of some items to their score, in percent."""
    import numpy as np

    if metric not in ("bleu", "chrf"):
        corpus = METRICS[metric].corpus
        assert corpus is not None
        return lambda rows: 100 * corpus([pairs[row] for row in rows])
    sacrebleu = make_sacrebleu(metric)
    counts = np.array(sacrebleu._extract_corpus_statistics(*columns(pairs)), dtype=np.float64)  # (n, counts)
    return lambda rows: sacrebleu._compute_score_from_stats(list(counts[rows].sum(axis=0))).score
