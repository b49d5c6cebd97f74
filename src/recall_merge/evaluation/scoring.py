"""Metrics of written answers, and the functions that a task's definition for lm-eval names.

To add a metric, decorate a function (prediction, right answers) -> score from 0 to 1 with `@metric`. The validation of tasks, the help of
`recall evaluate` and the definitions for lm-eval follow from `METRICS`.

`export_task` copies this file beside a task, so that lm-eval's own command line scores by the same code. It therefore imports nothing of
this package, and sacrebleu only where it is needed.
"""

from __future__ import annotations

import functools
import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

# lm-eval's own, for rows with choices: the choice with the highest log-likelihood, in total, or per character
CHOICE_METRICS = ("acc", "acc_norm")
NO_ANSWER = frozenset({"", "unanswerable", "no answer", "not answerable"})  # normalised answers that say that the question has none

_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")

Pair = tuple[str, Sequence[str]]  # a prediction and its right answers
Score = Callable[[str, Sequence[str]], float]


class Metric(NamedTuple):
    """How written answers are scored."""

    score: Score  # of one answer, from 0 to 1
    corpus: Callable[[Sequence[Pair]], float] | None  # of all answers together, where that is not the mean over answers
    beside: tuple[str, ...]  # metrics that are reported with this one


METRICS: dict[str, Metric] = {}


def metric(name: str, *, corpus: Callable[[Sequence[Pair]], float] | None = None, beside: tuple[str, ...] = ()) -> Callable[[Score], Score]:
    """Register a function of METRICS. Texts are compared in one form of Unicode (NFC): an accent written apart is no other letter."""

    def register(score: Score) -> Score:
        if name in METRICS or name in CHOICE_METRICS:
            raise ValueError(f"there are two metrics '{name}'")

        @functools.wraps(score)
        def composed(prediction: str, answers: Sequence[str]) -> float:
            return score(*_composed((prediction, answers)))

        METRICS[name] = Metric(composed, corpus, beside)
        return composed

    return register


@metric("exact_match")
def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is one of the answers, letter by letter. White space at the ends and its amount between words do not count, nor
    how an accent is written (NFC), for this metric as for all.

    >>> exact_match(" New  York ", ["New York"]), exact_match("new york", ["New York"])
    (1.0, 0.0)
    """
    return float(_words(prediction) in map(_words, answers))


@metric("squad_match")
def squad_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is one of the answers after SQuAD's normalisation (SQuAD's "exact match").

    >>> squad_match("The Beatles.", ["beatles"]), squad_match("No answer", ["unanswerable"])
    (1.0, 1.0)
    """
    return max(float(_squad(prediction) == _squad(answer)) for answer in answers)


@metric("f1", beside=("squad_match",))
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


@metric("last_number")
def last_number(prediction: str, answers: Sequence[str]) -> float:
    """1 if the last number of the prediction equals the last number of an answer: 48 = 48.0, 1,200 = 1200. Commas set off thousands, a
    point sets off decimals. 0 if the prediction has no number.

    >>> last_number("169 - (69+52) = 48.0 factories", ["= 48"]), last_number("none", ["= 48"])
    (1.0, 0.0)
    """
    number = _last_number(prediction)
    return float(number is not None and number in map(_last_number, answers))


def _register_sacrebleu(name: str) -> None:
    """BLEU or chrF2 of all answers together, and of one sentence, for looking at single answers: sacrebleu's, at its defaults, / 100."""

    def corpus(pairs: Sequence[Pair]) -> float:
        return make_sacrebleu(name).corpus_score(*columns(pairs)).score / 100

    @metric(name, corpus=corpus)
    def sentence(prediction: str, answers: Sequence[str]) -> float:
        import sacrebleu

        return getattr(sacrebleu, f"sentence_{name}")(prediction, list(answers)).score / 100


_register_sacrebleu("bleu")
_register_sacrebleu("chrf")


def make_sacrebleu(name: str) -> Any:
    """sacrebleu's metric of this name."""
    import sacrebleu

    return getattr(sacrebleu, name.upper())()


def columns(pairs: Sequence[Pair]) -> tuple[list[str], list[list[str | None]]]:
    """Predictions, and as many lists of references as an item has at most: what sacrebleu takes."""
    pairs = list(map(_composed, pairs))
    most = max(len(answers) for _, answers in pairs)
    references = [[answers[i] if i < len(answers) else None for _, answers in pairs] for i in range(most)]
    return [prediction for prediction, _ in pairs], references


# What a definition names with `!function`. lm-eval calls `documents` with `dataset_kwargs`, `process_NAME` with a document and
# [prediction], and `corpus_NAME` with the pairs of all documents.


def documents(file: str, **_: Any) -> dict[str, Any]:
    """The documents of a task: the JSON lines beside this file."""
    import datasets

    with Path(__file__).with_name(file).open(encoding="utf-8") as lines:
        return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}


def __getattr__(name: str) -> Any:
    """`process_NAME` of every metric, `corpus_NAME` of those with a score of their own for a corpus."""
    kind, _, of = name.partition("_")
    if kind == "process" and of in METRICS:
        return _process(of)
    if kind == "corpus" and of in METRICS and METRICS[of].corpus:
        return METRICS[of].corpus
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _process(name: str) -> Callable[[Mapping[str, Any], Sequence[str]], dict[str, Any]]:
    def process(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
        pair = written_answer(results[0], document["answers"]), document["answers"]
        return {each: pair if METRICS[each].corpus else METRICS[each].score(*pair) for each in (name, *METRICS[name].beside)}

    return process


def written_answer(text: str, answers: Sequence[str]) -> str:
    """What counts of a text that a model wrote: its first line, where the right answers have one line; empty lines before it do not count.

    >>> written_answer("\\n\\n Paris\\nIt is in France", ["Paris"]), written_answer("a\\nb", ["a\\nb"])
    ('Paris', 'a\\nb')
    """
    text = text.strip()
    return text if any("\n" in answer for answer in answers) else text.partition("\n")[0].rstrip()


def _composed(pair: Pair) -> Pair:
    prediction, answers = pair
    return unicodedata.normalize("NFC", prediction), [unicodedata.normalize("NFC", answer) for answer in answers]


def _words(text: str) -> str:
    return " ".join(text.split())


def _squad(text: str) -> str:
    """SQuAD's normalisation: lower case, no punctuation, no articles, single spaces; '' where the text says that there is no answer."""
    letters = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    words = _words(re.sub(r"\b(a|an|the)\b", " ", letters))
    return "" if words in NO_ANSWER else words


def _f1(prediction: str, answer: str) -> float:
    predicted, right = prediction.split(), answer.split()
    if not predicted or not right:
        return float(predicted == right)
    common = sum((Counter(predicted) & Counter(right)).values())
    return 2 * common / (len(predicted) + len(right))  # = 2 p r / (p + r)


def _last_number(text: str) -> Decimal | None:
    numbers = _NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None
