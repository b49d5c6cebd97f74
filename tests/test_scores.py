"""What a model's own files may not change: how it is asked."""

import json

import pytest
import torch
from safetensors.torch import save_file

from recall_merge.evaluation.evaluate import evaluate
from recall_merge.evaluation.scores import check_lengths, score_tasks
from recall_merge.evaluation.tasks import TaskSpec
from recall_merge.files.rows import parse_rows
from recall_merge.models.load import build_model, load_model
from recall_merge.runtime.errors import CheckpointError, DataError
from tiny import edit_json, forced, load_tensors, lora, make_model, make_tokenizer, save_model, write_rows

PROMPTS = ["the quick brown", "is this a good film? say yes or no", "jump over it"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(make_model(seed=3), tmp_path_factory.mktemp("scores") / "model")


def written(model, tokenizer, prompt: str, count: int) -> str:
    """What a model writes greedily, in plain torch."""
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True).strip()


RULES = {
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 1,
    "max_new_tokens": 1,
    "min_new_tokens": 20,
    "max_time": 1e-9,
    "num_beams": 4,
    "exponential_decay_length_penalty": [1, 9.0],
    "forced_eos_token_id": 5,
    "bad_words_ids": [[40], [41], [42]],
}


@pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
def test_a_generation_config_changes_no_score(folder, tmp_path, place):
    """The right answers are those of plain torch; a folder with rules of its own is scored as the same weights in memory are."""
    tokenizer, plain = make_tokenizer(), make_model(seed=3)
    rows = parse_rows([{"prompt": prompt, "completion": written(plain, tokenizer, prompt, 12)} for prompt in PROMPTS], where="rows")
    task = TaskSpec("t", rows)
    [bare] = score_tasks(*load_model(folder, device="cpu"), [task])
    assert all(item.prediction.startswith(row.completion) for item, row in zip(bare.items, rows, strict=True))
    for key, value in RULES.items():
        ruled = save_model(plain, tmp_path / key)
        edit_json(ruled / place, **{key: value})
        model, tokenizer = load_model(ruled, device="cpu")
        [score] = score_tasks(model, tokenizer, [task])
        assert score == bare, key
        assert json.loads((ruled / place).read_text())[key] == value
        in_memory = build_model(ruled, load_tensors(ruled))
        assert score_tasks(in_memory, tokenizer, [task]) == [bare], key


def test_a_model_stops_at_its_own_end_tokens(folder, tmp_path):
    tokenizer, plain = make_tokenizer(), make_model(seed=3)
    long = written(plain, tokenizer, PROMPTS[0], 12)
    end = tokenizer(long, add_special_tokens=False)["input_ids"][5]
    ended = save_model(plain, tmp_path / "ended")
    edit_json(ended / "generation_config.json", eos_token_id=[2, end])
    rows = parse_rows([{"prompt": PROMPTS[0], "completion": long}], where="rows")
    for model in (load_model(ended, device="cpu")[0], build_model(ended, load_tensors(ended))):
        [score] = score_tasks(model, tokenizer, [TaskSpec("t", rows)])
        assert score.items[0].prediction == written(plain, tokenizer, PROMPTS[0], 6)
        assert model.generation_config.eos_token_id == [2, end]


@pytest.mark.parametrize("said", ["\nthe dog", "\n\n the dog\nand the fox", " the dog\n\nand the fox", " the dog"])
def test_an_answer_that_begins_with_or_holds_a_new_line_is_read(said):
    tokenizer = make_tokenizer()
    rows = parse_rows(
        [{"prompt": "is it good?", "completion": said}, {"prompt": "is it the other?", "completion": "\nthe dog"}], where="rows"
    )
    model = forced(tokenizer, ["".join((row.plain, row.completion)) for row in rows])
    [score] = score_tasks(model, tokenizer, [TaskSpec("t", rows)])
    assert [item.prediction for item in score.items] == [said.strip(), "the dog"]
    assert score.score == 1.0


def test_a_further_right_answer_may_be_longer_and_have_more_lines():
    tokenizer = make_tokenizer()
    long = "the quick brown fox jumps over the lazy dog\nand the other dog sees it"
    rows = parse_rows([{"prompt": "is it good?", "completion": " dog"}], where="rows")
    [score] = score_tasks(forced(tokenizer, [f"is it good? {long}"]), tokenizer, [TaskSpec("t", rows, answers={0: [long]})])
    assert (score.items[0].prediction, score.score) == (long, 1.0)


def test_one_line_counts_where_the_right_answers_have_one():
    tokenizer = make_tokenizer()
    rows = parse_rows([{"prompt": "is it good?", "completion": " the dog"}], where="rows")
    [score] = score_tasks(forced(tokenizer, ["is it good?\n the dog\nis it"]), tokenizer, [TaskSpec("t", rows)])
    assert (score.items[0].prediction, score.score) == ("the dog", 1.0)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["lm_head.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
def test_a_model_with_numbers_that_are_not_finite_has_no_score(folder, tmp_path, place, number):
    broken = save_model(make_model(seed=3), tmp_path / "broken")
    tensors = load_tensors(broken)
    tensors[place].view(-1)[3] = number
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    choices = parse_rows([{"prompt": "is it?", "completion": word, "choices": [" yes", " no"]} for word in (" yes", " no")], where="rows")
    answers = parse_rows([{"prompt": "is it?", "completion": " yes"}], where="rows")
    model, tokenizer = load_model(broken, device="cpu")
    for rows in (choices, answers):
        with pytest.raises(CheckpointError, match=f"NaN or infinite, so it has no score\n  where: {broken}"):
            score_tasks(model, tokenizer, [TaskSpec("t", rows)])
    adapter = lora(folder, tmp_path / "adapter", target_modules=["q_proj"])
    assert load_model(adapter, folder, device="cpu")[0].name_or_path == str(adapter)


def test_a_token_may_be_ruled_out(folder):
    model, tokenizer = load_model(folder, device="cpu")

    def rule_out(_, args, output):
        output.logits[..., 7] = -float("inf")

    hook = model.register_forward_hook(rule_out)
    rows = parse_rows([{"prompt": "is it?", "completion": " yes", "choices": [" yes", " no"]}], where="rows")
    [score] = score_tasks(model, tokenizer, [TaskSpec("t", rows)])
    hook.remove()
    assert score.n == 1


def test_rows_of_megabytes_are_refused_from_their_beginnings(folder, monkeypatch):
    """Neither prompts nor answers are tokenised beyond what the model can read."""
    tokenizer, lengths = load_model(folder)[1], []
    asked = type(tokenizer).__call__

    def listen(self, texts, **options):
        lengths.extend(map(len, [texts] if isinstance(texts, str) else texts))
        return asked(self, texts, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", listen)
    monkeypatch.setattr("recall_merge.evaluation.scores.load_tokenizer", lambda *_: tokenizer)
    for record in ({"prompt": "the fox " * 100_000, "completion": "yes"}, {"prompt": "the", "completion": "dog " * 100_000}):
        rows = parse_rows([record, {"prompt": "the", "completion": "dog"}], where="rows")
        assert "longer than the 128 tokens" in next(iter(check_lengths(folder, [TaskSpec("t", rows)]))).what
    assert max(lengths) < 20_000


def test_rows_that_cannot_be_rendered_are_refused_before_the_model_is_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("recall_merge.evaluation.evaluate.load_model", None)
    turns = [{"role": "user", "content": "is it?"}, {"role": "assistant", "content": "yes"}]
    rows = write_rows(tmp_path / "chat.jsonl", [{"messages": turns}])
    adapter = lora(folder, tmp_path / "adapter", target_modules=["q_proj"])
    for model, base in ((folder, None), (adapter, str(folder))):
        with pytest.raises(DataError, match=r"needs a chat template.*\n  where: task 'chat', row 1"):
            evaluate(str(model), [str(rows)], base=base)
