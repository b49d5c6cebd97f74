"""The model card of a result, as huggingface_hub reads it: what it shows, what it never tells, and how scores come to it."""

import json
import sys

import pytest
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from typer.testing import CliRunner

from recall_merge import MergeRun, merge
from recall_merge.cli.app import app
from recall_merge.evaluation.evaluate import evaluate
from recall_merge.files.model_card import MODEL_CARD, PICTURE, add_scores, plain
from recall_merge.merging.verify import verify
from recall_merge.runtime.errors import CheckpointError, RunError
from tiny import fine_tuned, write_rows
from workspaces import make_workspace, teach, write_tasks

ROWS = [{"prompt": f"is the fox {word}?", "completion": " yes", "choices": [" yes", " no"]} for word in ("quick", "lazy", "good", "bad")]
SCORES = [
    {"task": "dates", "metric": "chrf", "score": 0.56123456, "stderr": 0.04, "n": 84},
    {"task": "opinion", "metric": "acc", "score": 0.95, "stderr": None, "n": 80},
]
HOSTILE = ("<script>alert(1)</script>", "![x](http://example.com/x.png)", "a|b\nc `d`", "x" * 10_000, "שלום 🦊")


@pytest.fixture(scope="module")
def world(bases, tmp_path_factory):
    """Two experts and rows, in a folder whose name nobody should read."""
    folder = tmp_path_factory.mktemp("jane-secret")
    for seed, name in enumerate("ab"):
        fine_tuned(bases("llama"), folder / name, seed=seed + 1)
    write_rows(folder / "rows.jsonl", ROWS)
    return folder


def merged(world, base, out, names=("a", "b"), **more):
    experts = [{"name": name, "path": str(world / path)} for name, path in zip(names, "ab", strict=False)]
    told = {"method": "recall", "samples": {"path": str(world / "rows.jsonl"), "count": 2}} | more
    return merge(MergeRun.model_validate({"base": str(base), "experts": experts, "out": {"path": str(out)}, **told})).path


def round_trip(folder) -> ModelCard:
    """What the hub's classes read of a card is what is written, and they write the same again."""
    text = (folder / MODEL_CARD).read_text("utf-8")
    card = ModelCard(text)
    assert card.content == text
    assert ModelCard(card.content).data.to_dict() == card.data.to_dict()
    assert isinstance(card.data, ModelCardData)
    return card


def test_card_shows_the_picture_and_the_record_in_short(world, llama, tmp_path):
    out = merged(world, llama, tmp_path / "out", options={"temperature": 0.5})
    card = round_trip(out)
    assert f"]({PICTURE})" in card.text
    assert (out / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert PICTURE in json.loads((out / "record.json").read_text())["files"]
    for told in (
        "- method: `recall`",
        "- option temperature: 0.5",
        "- compared on 2 typical samples",
        "- seed 0; made ",
        "| layer | a | b |",
    ):
        assert told in card.text, told
    assert card.data.eval_results is None
    published = "".join(path.read_text("utf-8") for path in (out / MODEL_CARD, out / "record.json"))
    assert "jane-secret" not in published and str(tmp_path) not in published
    assert b"jane-secret" not in (out / PICTURE).read_bytes()


def test_same_merge_draws_the_same_picture(world, llama, tmp_path):
    first, again = (merged(world, llama, tmp_path / name) for name in ("first", "again"))
    assert (first / PICTURE).read_bytes() == (again / PICTURE).read_bytes()


def test_where_all_depths_weigh_alike_there_is_no_picture(world, llama, tmp_path):
    out = merged(world, llama, tmp_path / "out", method="linear", samples=None)
    assert not (out / PICTURE).exists() and PICTURE not in round_trip(out).text


def test_without_the_extra_the_card_has_its_tables_alone(world, llama, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "altair", None)
    out = merged(world, llama, tmp_path / "out")
    assert not (out / PICTURE).exists() and PICTURE not in (out / MODEL_CARD).read_text()
    assert "| layer | a | b |" in round_trip(out).text


def test_names_of_users_mean_nothing_but_themselves(world, llama, tmp_path):
    for at in (0, 2, 4):
        names = (HOSTILE[at], HOSTILE[(at + 1) % 5])
        text = round_trip(merged(world, llama, tmp_path / f"out{at}", names)).text
        assert "<script" not in text and "![x](" not in text
        table = next(line for line in text.splitlines() if line.startswith("| layer |"))
        assert table.replace("\\|", "").count("|") == 4 and len(table) < 300
        assert all(plain(name) in text for name in names)


def test_scores_are_the_model_index_and_a_table(world, llama, tmp_path):
    out = merged(world, llama, tmp_path / "out")
    add_scores(out, "mine", SCORES)
    card = round_trip(out)
    assert card.data.model_name == "mine"
    found = {(one.dataset_type, one.metric_type): one for one in card.data.eval_results}
    assert {key: one.metric_value for key, one in found.items()} == {
        ("dates", "chrf"): 0.5612,
        ("dates", "chrf_stderr"): 0.04,
        ("opinion", "acc"): 0.95,
    }
    assert all(isinstance(one, EvalResult) for one in found.values())
    assert found["opinion", "acc"].dataset_args == {"rows": 80}
    name, again = model_index_to_eval_results(eval_results_to_model_index("mine", card.data.eval_results))
    assert (name, again) == ("mine", card.data.eval_results)
    assert "| dates | chrf | 0.5612 | 0.04 | 84 |" in card.text and "| opinion | acc | 0.95 | - | 80 |" in card.text
    verify(out)  # the card is no part of what a record holds


def test_a_new_score_replaces_the_old_one_and_what_people_wrote_stays(world, llama, tmp_path):
    out = merged(world, llama, tmp_path / "out")
    add_scores(out, "mine", SCORES)
    (out / MODEL_CARD).write_text(
        (out / MODEL_CARD).read_text().replace("# Merged model", "# My model").replace("license", "licence") + "\nSee also.\n"
    )
    add_scores(out, "another", [{**SCORES[1], "score": 0.5}])
    card = round_trip(out)
    assert card.data.model_name == "mine"
    assert [one.metric_value for one in card.data.eval_results] == [0.5612, 0.04, 0.5]
    assert card.text.count("## Scores") == 1 and "0.95" not in card.text
    assert "# My model" in card.text and card.text.endswith("See also.\n")
    assert card.text.index("## Scores") < card.text.index("## How it was made")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no model card"),
        ("# no metadata\n", "no metadata"),
        ("---\na: [\n---\n", "cannot be read"),
        ("---\nmodel-index: 5\n---\n", "cannot be read"),
        ("---\nmodel-index:\n- name: x\n  results: 5\n---\n", "cannot be read"),
        ("---\n- a\n---\n", "no metadata"),
        ("---\na: 1\n---\n" + "x" * 1_000_001, "larger"),
    ],
)
def test_cards_that_cannot_be_read_are_told_before_any_work(tmp_path, llama, world, text, said):
    import shutil

    folder = shutil.copytree(llama, tmp_path / "model")
    if text is not None:
        (folder / MODEL_CARD).write_text(text)
    with pytest.raises((CheckpointError, RunError), match=said):
        evaluate(str(folder), [str(world / "rows.jsonl")], card=True)
    assert not (folder / MODEL_CARD).exists() if text is None else (folder / MODEL_CARD).read_text() == text


def test_evaluate_puts_scores_into_the_card(world, llama, tmp_path):
    out = merged(world, llama, tmp_path / "named")
    done = CliRunner().invoke(app, ["evaluate", str(out), "--tasks", f"fox={world / 'rows.jsonl'}", "--card", "--json", "-q"])
    assert done.exit_code == 0, done.output
    (score,) = json.loads(done.stdout)["scores"]
    card = round_trip(out)
    assert card.data.model_name == "named"
    told = card.data.eval_results[0]
    assert (told.dataset_type, told.metric_type, told.dataset_args) == ("fox", "acc", {"rows": 4})
    assert told.metric_value == round(score["score"], 4)
    assert "jane-secret" not in (out / MODEL_CARD).read_text()


def test_a_stage_of_a_workspace_tells_its_scores(bases, tmp_path):
    data = write_tasks(tmp_path)
    space = make_workspace(tmp_path / "space", bases("llama"))
    teach(space, data, "a")
    learned = teach(space, data, "b")
    card = round_trip(space / "merges" / "2")
    assert card.data.model_name == "space-2"
    values = {one.dataset_type: one.metric_value for one in card.data.eval_results if one.metric_type == "acc"}
    assert values == {name: round(score, 4) for name, score in learned.stage.scores.merged.items()}
    verify(space / "merges" / "2")
