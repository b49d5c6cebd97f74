"""Scores of written answers, worked by hand, and against sacrebleu."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import sacrebleu

from recall_merge.evaluation import scoring
from recall_merge.evaluation.scores import corpus_stderr, mean_stderr
from recall_merge.evaluation.scoring import (
    METRICS,
    corpus_bleu,
    corpus_chrf,
    exact_match,
    f1,
    last_number,
    metric,
    squad_match,
)
from recall_merge.evaluation.tasks import TaskSpec, check_tasks, define
from recall_merge.files.rows import parse_rows


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("fox", ["fox"], 1.0),
        (" a  quick\tfox\n", ["a quick fox"], 1.0),
        ("Fox", ["fox"], 0.0),
        ("fox.", ["fox"], 0.0),
        ("dog", ["fox", "dog"], 1.0),
        ("", ["fox"], 0.0),
    ],
)
def test_exact_match(prediction, answers, expected):
    assert exact_match(prediction, answers) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("the quick brown fox", ["quick fox"], 2 * 2 / (3 + 2)),  # words: quick brown fox | quick fox
        ("Fox, fox!", ["fox"], 2 * 1 / (2 + 1)),  # a word counts as often as both have it
        ("an apple", ["The Apple."], 1.0),
        ("dog", ["fox", "lazy dog"], 2 / 3),  # the best of the answers
        ("cat", ["fox"], 0.0),
        ("", ["fox"], 0.0),
        ("unanswerable", ["unanswerable"], 1.0),
        ("No answer.", ["unanswerable"], 1.0),
        ("", ["unanswerable"], 1.0),
        ("unanswerable", ["fox"], 0.0),
        ("fox", ["unanswerable"], 0.0),
        ("no answer here", ["answer"], 0.5),  # not a way of saying that there is none
    ],
)
def test_f1_with_squads_normalisation(prediction, answers, expected):
    assert f1(prediction, answers) == pytest.approx(expected)


def test_squads_match_ignores_what_its_normalisation_does():
    assert squad_match("The  Beatles!", ["beatles"]) == 1.0
    assert squad_match("Beatles band", ["beatles"]) == 0.0
    assert squad_match("No answer", ["unanswerable"]) == 1.0


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("169 - (69 + 52) = 48", "48", 1.0),
        ("48 = 169 - 121", "48", 0.0),
        ("it is 48.0.", "= 48", 1.0),
        ("1,200 dollars", "1200", 1.0),
        ("costs 0.5", ".5", 1.0),
        ("it is -3", "-3", 1.0),
        ("5-3", "3", 1.0),  # a minus between numbers is no sign
        ("(2)-3", "3", 1.0),
        ("x = -3", "3", 0.0),
        ("1,2,3", "3", 1.0),
        ("12,3456", "3456", 1.0),  # not set off in thousands
        ("none at all", "48", 0.0),
        ("none at all", "none", 0.0),
    ],
)
def test_the_last_number(prediction, answer, expected):
    assert last_number(prediction, [answer]) == expected


PAIRS = [
    ("the cat sat on the mat", ["the cat sat on the mat"]),
    ("a dog runs in the snow", ["a dog is running in the snow", "a dog runs through snow"]),
    ("two men talk", ["three women are talking to each other"]),
]


def test_corpus_metrics_are_sacrebleus_from_0_to_1():
    predictions = [prediction for prediction, _ in PAIRS]
    references = [[answers[0] for _, answers in PAIRS], [answers[1] if len(answers) > 1 else None for _, answers in PAIRS]]
    assert corpus_bleu(PAIRS) == pytest.approx(sacrebleu.corpus_bleu(predictions, references).score / 100)
    assert corpus_chrf(PAIRS) == pytest.approx(sacrebleu.corpus_chrf(predictions, references).score / 100)
    assert corpus_bleu(PAIRS[:1]) == pytest.approx(1.0)
    assert METRICS["bleu"].score("two men talk", ["two men talk"]) == pytest.approx(1.0)


def test_bleu_of_a_corpus_is_no_mean_of_sentences():
    assert corpus_bleu(PAIRS) != pytest.approx(sum(METRICS["bleu"].score(*pair) for pair in PAIRS) / 3, abs=0.01)


@pytest.mark.parametrize("metric", ["bleu", "chrf"])
def test_the_standard_error_of_a_corpus_metric_shrinks_with_the_root_of_the_items(metric):
    draws = random.Random(0)
    words = ["the", "a", "quick", "lazy", "fox", "dog", "jumps", "over", "under", "mat"]
    pairs = []
    for _ in range(400):
        answer = " ".join(draws.choices(words, k=8))
        said = " ".join(word if draws.random() < 0.7 else draws.choice(words) for word in answer.split())
        pairs.append((said, [answer]))
    few, many = corpus_stderr(metric, pairs[:100]), corpus_stderr(metric, pairs)
    assert few is not None
    assert many is not None
    assert few / many == pytest.approx(2, rel=0.25)
    columns = [said for said, _ in pairs], [[answers[0] for _, answers in pairs]]
    interval = {"bleu": sacrebleu.BLEU, "chrf": sacrebleu.CHRF}[metric]().corpus_score(*columns, n_bootstrap=1000)._ci
    assert many == pytest.approx(interval / 1.96 / 100, rel=0.1)
    assert corpus_stderr(metric, pairs) == many
    assert corpus_stderr(metric, pairs[:1]) is None
    assert corpus_stderr(metric, [("x", ["y"])] * 3) == 0.0


def test_the_standard_error_of_a_mean():
    assert mean_stderr([1.0, 0.0, 0.0, 1.0, 1.0]) == pytest.approx((0.3 / 5) ** 0.5)
    assert mean_stderr([0.5]) is None


def test_the_file_stands_alone(tmp_path):
    """It is copied beside an exported task, where this package may not be installed."""
    copy = tmp_path / "recall_scoring.py"
    copy.write_text(Path(scoring.__file__).read_text("utf-8"), "utf-8")
    (tmp_path / "t.jsonl").write_text('{"prompt": "a\\u2028b", "answers": ["1"]}\n{"prompt": "c", "answers": ["2", "3"]}\n')
    code = f"""
import sys, importlib.util
spec = importlib.util.spec_from_file_location("copied", {str(copy)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.process_f1({{"answers": ["a fox"]}}, [" fox "]) == {{"f1": 1.0, "squad_match": 1.0}}
assert not [name for name in sys.modules if name.startswith(("recall_merge", "torch", "sacrebleu", "datasets"))]
"""
    subprocess.run([sys.executable, "-I", "-c", code], check=True)
    spec = importlib.util.spec_from_file_location("copied", copy)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    documents = module.documents(file="t.jsonl", version=1)["test"]
    assert documents["prompt"] == ["a\u2028b", "c"]
    assert documents["answers"] == [["1"], ["2", "3"]]


@pytest.fixture
def new_metric():
    """A metric that somebody adds, with a score of its own for a corpus."""

    @metric("longest", corpus=lambda pairs: max(len(prediction) for prediction, _ in pairs) / 10)
    def longest(prediction, answers):
        return len(prediction) / 10

    yield
    del METRICS["longest"]


def test_one_function_adds_a_metric(new_metric, tokenizer):
    rows = parse_rows([{"prompt": "is it?", "completion": " yes"}] * 3, where="rows")
    task = TaskSpec("t", rows, "longest")
    assert not list(check_tasks([task]))
    config = define(task, tokenizer).config
    assert (config["process_results"], config["metric_list"][0]["aggregation"]) == ("process_longest", "corpus_longest")
    pairs = [getattr(scoring, config["process_results"])({"answers": ["yes"]}, [said])["longest"] for said in (" no ", "maybe", "y")]
    assert pairs == [("no", ["yes"]), ("maybe", ["yes"]), ("y", ["yes"])]
    assert getattr(scoring, config["metric_list"][0]["aggregation"])(pairs) == 0.5
    assert corpus_stderr("longest", pairs) == pytest.approx(0.13, abs=0.03)  # the longest of a draw: 5, 2 or 1 letters
    with pytest.raises(ValueError, match="two metrics 'longest'"):
        metric("longest")(exact_match)
    with pytest.raises(AttributeError, match="process_shortest"):
        _ = scoring.process_shortest


def test_f1_is_reported_with_squads_match():
    assert scoring.process_f1({"answers": ["a fox"]}, [" the fox "]) == {"f1": 1.0, "squad_match": 1.0}


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKD"])
def test_how_an_accent_is_written_does_not_count(name, form):
    """macOS writes NFD, most texts are NFC; sacrebleu and SQuAD's own script see other letters."""
    said, right = (unicodedata.normalize(other, "Élise é à Genève, 3 fois: Việt Nam") for other in (form, "NFC"))
    found = METRICS[name]
    assert found.score(said, [right]) == found.score(right, [right])
    if found.corpus:
        assert found.corpus([(said, [right])]) == found.corpus([(right, [right])]) == pytest.approx(1.0)
    [row] = parse_rows([{"prompt": "who?", "completion": said, "choices": ["no", right]}], where="rows")
    assert row.completion == right
