"""How a generated answer is scored, and the functions that a task's definition for lm-eval names.

`export_task` copies this file beside a task, so that lm-eval's own command line scores by the very same code: it imports nothing of
this package, and sacrebleu only where it is needed.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

NO_ANSWER = frozenset({"", "unanswerable", "no answer", "not answerable"})
"""What counts as saying that the question has no answer, once normalised."""

_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
DRAWS = 1000  # of the bootstrap of a corpus metric


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is one of the answers, letter by letter, but for white space at the ends and how much is between words.

    >>> exact_match(" New  York ", ["New York"]), exact_match("new york", ["New York"])
    (1.0, 0.0)
    """
    return float(_words(prediction) in map(_words, answers))


def squad_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is one of the answers after SQuAD's normalisation (SQuAD's "exact match").

    >>> squad_match("The Beatles.", ["beatles"]), squad_match("No answer", ["unanswerable"])
    (1.0, 1.0)
    """
    return max(float(_squad(prediction) == _squad(answer)) for answer in answers)


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Overlap of words, SQuAD's F1: 2 p r / (p + r), the best over the answers (Rajpurkar et al. 2018).

    p, r = words in common (with repeats) / words of the prediction, of the answer; words after SQuAD's normalisation: lower case, no
    punctuation, no articles. Where either has no answer (`NO_ANSWER`) it is 1 if both have none, else 0.

    >>> f1("the red cat", ["a red car"])    # one word in common of two and two
    0.5
    >>> f1("unanswerable", ["red"]), f1("no answer", ["unanswerable"])
    (0.0, 1.0)
    """
    return max(_f1(_squad(prediction), _squad(answer)) for answer in answers)


def last_number(prediction: str, answers: Sequence[str]) -> float:
    """1 if the last number of the prediction is the last number of an answer, as numbers: 48 = 48.0, 1,200 = 1200; a comma sets off
    thousands, a point decimals. 0 where the prediction has no number.

    >>> last_number("169 - (69+52) = 48.0 factories", ["= 48"]), last_number("none", ["= 48"])
    (1.0, 0.0)
    """
    found = _last_number(prediction)
    return float(found is not None and found in map(_last_number, answers))


def bleu(prediction: str, answers: Sequence[str]) -> float:
    """BLEU of one sentence, from 0 to 1: for looking at single items. The score of a task is that of the corpus (`corpus_bleu`)."""
    import sacrebleu

    return sacrebleu.sentence_bleu(prediction, list(answers)).score / 100


def chrf(prediction: str, answers: Sequence[str]) -> float:
    """chrF2 of one sentence, from 0 to 1: for looking at single items. The score of a task is that of the corpus (`corpus_chrf`)."""
    import sacrebleu

    return sacrebleu.sentence_chrf(prediction, list(answers)).score / 100


ITEM_METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "f1": f1,
    "bleu": bleu,
    "chrf": chrf,
    "last_number": last_number,
}
"""Metrics of generated answers, each from 0 to 1: (prediction, right answers) -> score of one item."""

Pair = tuple[str, Sequence[str]]


def corpus_bleu(pairs: Sequence[Pair]) -> float:
    """BLEU of all (prediction, answers) together, from 0 to 1: sacrebleu's, at its defaults, / 100."""
    return _metric("bleu").corpus_score(*_columns(pairs)).score / 100


def corpus_chrf(pairs: Sequence[Pair]) -> float:
    """chrF2 of all (prediction, answers) together, from 0 to 1: sacrebleu's, at its defaults, / 100."""
    return _metric("chrf").corpus_score(*_columns(pairs)).score / 100


CORPUS_METRICS = {"bleu": corpus_bleu, "chrf": corpus_chrf}
"""Metrics that are no mean over items: their score is taken over all items at once."""


def corpus_stderr(metric: str, pairs: Sequence[Pair]) -> float | None:
    """Standard error of a corpus metric: the standard deviation of the score over 1000 draws of as many items, with replacement and a
    fixed seed; None for a single item."""
    import numpy as np

    if len(pairs) < 2:
        return None
    sacrebleu = _metric(metric)
    counts = np.array(sacrebleu._extract_corpus_statistics(*_columns(pairs)), dtype=np.float64)  # (n, counts), which add up
    rng = np.random.default_rng(0)
    draws = (counts[rng.integers(len(counts), size=len(counts))].sum(axis=0) for _ in range(DRAWS))
    return float(np.std([sacrebleu._compute_score_from_stats(list(draw)).score for draw in draws], ddof=1)) / 100


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


# What a definition names with `!function`. lm-eval calls the first with `dataset_kwargs`, the others with a document and [prediction].


def documents(file: str, **_: Any) -> dict[str, Any]:
    """The documents of a task: the JSON lines beside this file."""
    import datasets

    with Path(__file__).with_name(file).open(encoding="utf-8") as lines:
        return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}


def _process(metric: str) -> Callable[[Mapping[str, Any], Sequence[str]], dict[str, Any]]:
    def process(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
        prediction, answers = results[0].strip(), document["answers"]
        return {metric: (prediction, answers) if metric in CORPUS_METRICS else ITEM_METRICS[metric](prediction, answers)}

    return process


process_exact_match = _process("exact_match")
process_last_number = _process("last_number")
process_bleu = _process("bleu")
process_chrf = _process("chrf")


def process_f1(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """F1, and beside it the match that SQuAD reports with it."""
    prediction, answers = results[0].strip(), document["answers"]
    return {"f1": f1(prediction, answers), "squad_match": squad_match(prediction, answers)}


def _words(text: str) -> str:
    return " ".join(text.split())


def _squad(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles, single spaces; '' where it says that there is no answer."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    words = _words(re.sub(r"\b(a|an|the)\b", " ", kept))
    return "" if words in NO_ANSWER else words


def _f1(prediction: str, answer: str) -> float:
    said, right = prediction.split(), answer.split()
    if not said or not right:
        return float(said == right)
    common = sum((Counter(said) & Counter(right)).values())
    return 2 * common / (len(said) + len(right))  # = 2 p r / (p + r)


def _last_number(text: str) -> Decimal | None:
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def _metric(name: str) -> Any:
    import sacrebleu

    return {"bleu": sacrebleu.BLEU, "chrf": sacrebleu.CHRF}[name]()


def _columns(pairs: Sequence[Pair]) -> tuple[list[str], list[list[str | None]]]:
    """Predictions, and as many lists of references as an item has at most, as sacrebleu takes them."""
    widest = max(len(answers) for _, answers in pairs)
    references = [[answers[i] if i < len(answers) else None for _, answers in pairs] for i in range(widest)]
    return [prediction for prediction, _ in pairs], references
