"""Scores against plain torch, against transformers' own generate, against lm-eval's own way and its own command line."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict, replace

import pytest
import torch
import yaml

from recall_merge.evaluation.lm_eval_private import LocalModel, silence, window_of
from recall_merge.evaluation.scores import TaskScore, check_lengths, score_tasks
from recall_merge.evaluation.tasks import SPARE_TOKENS, TaskSpec, check_tasks, define, export_task
from recall_merge.files.rows import Row, parse_rows
from recall_merge.models import load
from recall_merge.models.load import load_tokenizer
from recall_merge.models.tokens import render
from recall_merge.runtime.errors import CheckpointError, DataError, RunError
from recall_merge.runtime.progress import Silent
from tiny import load_model, make_model, make_tokenizer, save_model

CHOICES = parse_rows(
    [
        {"prompt": "is this good?", "completion": " yes", "choices": [" yes", " no"]},
        {"prompt": "the quick fox, is it good?", "completion": " no", "choices": [" yes", " no"]},
        {"prompt": "which?", "completion": " the dog", "choices": [" the fox", " the dog", " the lazy dog"]},  # one beginning in common
        {"prompt": "is it the other dog?", "completion": " no", "choices": [" it is", " no", " maybe it is the fox", " y"]},
    ],
    where="choices",
)
ANSWERS = parse_rows(
    [
        {"prompt": "the quick brown", "completion": " fox"},
        {"prompt": "is this a good film? say yes or no", "completion": " the fox"},
        {"prompt": "jump", "completion": " over it"},
        {"prompt": "is the lazy dog there? it is the other dog", "completion": " yes"},
    ],
    where="answers",
)


@pytest.fixture(scope="module")
def model():
    return make_model(seed=3, max_position_embeddings=256)


def loglikelihood(model, tokenizer, prompt: str, text: str) -> float:
    """Of text after prompt, in plain torch."""
    start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = tokenizer(prompt + text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    return sum(float(torch.log_softmax(logits[i - 1], -1)[ids[i]]) for i in range(len(start), len(ids)))


def local_model(model, tokenizer, batch_size: int = 2):
    local = LocalModel(model, tokenizer, batch_size=batch_size, progress=Silent())
    local.add_bos_token = False
    return local


class Asked:
    """What lm-eval calls a request."""

    task_name = None

    def __init__(self, *args):
        self.args = args


@pytest.mark.parametrize("template", [False, True])
def test_the_likeliest_choice_is_taken(model, template):
    tokenizer = make_tokenizer(template=template)
    [score] = score_tasks(model, tokenizer, [TaskSpec("choices", CHOICES)])
    right = []
    for row, item in zip(CHOICES, score.items, strict=True):
        prompt = render(row, tokenizer).prompt
        words = [choice.strip() if template else choice for choice in row.choices]
        likelihoods = [loglikelihood(model, tokenizer, prompt, choice) for choice in words]
        best = likelihoods.index(max(likelihoods))
        assert (item.id, item.prediction, item.choices) == (row.index, row.choices[best].strip(), len(row.choices))
        right.append(float(row.choices[best] == row.completion))
    assert [item.score for item in score.items] == right
    assert (score.metric, score.n) == ("acc", 4)
    assert score.score == sum(right) / 4
    assert set(score.others) == {"acc_norm"}


def test_the_standard_error_is_that_of_a_mean(model, tokenizer):
    [score] = score_tasks(model, tokenizer, [TaskSpec("choices", CHOICES)])
    mean = score.score
    by_hand = (sum((item.score - mean) ** 2 for item in score.items if item.score is not None) / 3 / 4) ** 0.5
    assert score.stderr == pytest.approx(by_hand)
    [alone] = score_tasks(model, tokenizer, [TaskSpec("choices", CHOICES)], limit=1)
    assert (alone.n, alone.stderr) == (1, None)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3-moe"])
def test_choices_that_share_a_prompt_answer_as_if_each_ran_alone(bases, family):
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = load_model(bases(family), dtype="float32"), make_tokenizer()
    texts = [
        ("is it?", " yes"),
        ("is it?", " no"),
        ("is it?", " no it is"),
        ("it is?", " y"),
        ("", " yes"),
        ("is it?", " no it was the dog"),
    ]
    texts += [("the dog", " is"), ("the fox", " is"), ("is it?", " no")]
    asked = [Asked(context, text) for context, text in texts]
    with silence():
        theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, add_bos_token=False).loglikelihood(asked, disable_tqdm=True)
        ours = local_model(model, tokenizer).loglikelihood(asked)
    assert [likelihood for likelihood, _ in ours] == pytest.approx([likelihood for likelihood, _ in theirs], abs=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert ours[1] == ours[-1]


def test_a_prompt_runs_once_for_all_of_its_choices(model, tokenizer):
    ran = []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: ran.append(args[0].numel()), with_kwargs=True)
    try:
        with silence():
            local_model(model, tokenizer).loglikelihood(
                [Asked("the quick brown fox", choice) for choice in (" is it", " is he", " is the")]
            )
    finally:
        hook.remove()
    [prompt, tails] = ran
    whole = len(tokenizer("the quick brown fox is it")["input_ids"])
    assert prompt >= len(tokenizer("the quick brown fox is")["input_ids"])
    assert prompt + tails / 3 < whole, "the last token of a choice is only predicted"


def test_choices_of_one_token_take_one_pass(model, tokenizer):
    ran = []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: ran.append(tuple(args[0].shape)), with_kwargs=True)
    try:
        with silence():
            asked = [Asked(context, choice) for context in ("is it", "if it", "so") for choice in ("y", "n", "!")]
            local_model(model, tokenizer).loglikelihood(asked)
    finally:
        hook.remove()
    assert sorted(shape[0] for shape in ran) == [1, 2], "two prompts of one length together, the third alone, and nothing more"


def test_what_is_longer_than_the_window_is_left_to_lm_eval(tokenizer):
    from lm_eval.models.huggingface import HFLM

    small = make_model(max_position_embeddings=16)
    long = "the fox: " + "!?" * 4
    asked = [Asked(long + "!", " y"), Asked(long + "!", " n"), Asked(long, " y"), Asked(long, " n")]
    assert [len(tokenizer("".join(one.args))["input_ids"]) for one in asked[1:3]] == [18, 17], "17 and 16 are read"
    with silence():
        theirs = HFLM(pretrained=small, tokenizer=tokenizer, batch_size=1, add_bos_token=False).loglikelihood(asked, disable_tqdm=True)
        ours = local_model(small, tokenizer).loglikelihood(asked)
    assert [likelihood for likelihood, _ in ours] == pytest.approx([likelihood for likelihood, _ in theirs], abs=1e-4)


@pytest.mark.parametrize("template", [False, True])
def test_answers_are_what_the_model_generates_greedily(model, template):
    tokenizer = make_tokenizer(template=template)
    task = TaskSpec("answers", ANSWERS)
    longest = max(len(tokenizer(render(row, tokenizer).completion)["input_ids"]) for row in ANSWERS)
    [score] = score_tasks(model, tokenizer, [task], batch_size=4)
    for row, item in zip(ANSWERS, score.items, strict=True):
        ids = tokenizer(render(row, tokenizer).prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = model.generate(ids, max_new_tokens=longest + SPARE_TOKENS, do_sample=False, eos_token_id=2, pad_token_id=0)
        said = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).split("\n")[0].strip()
        assert item.prediction == said
        assert item.score == float(said == row.completion.strip())
    assert score.metric == "exact_match"


def obedient(tokenizer, answers: dict[str, str]):
    """A model that says a given answer after each prompt: a real one whose logits are replaced."""
    model = make_model(max_position_embeddings=256)
    plans = [(tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]) for prompt, answer in answers.items()]
    forward, past = model.forward, {}

    def says(input_ids=None, **kwargs):
        out = forward(input_ids=input_ids, **kwargs)
        cached = kwargs.get("past_key_values")
        before = past.get(id(cached), []) if input_ids.shape[1] == 1 else [[] for _ in input_ids]
        rows = [old + new for old, new in zip(before, input_ids.tolist(), strict=True)]
        past[id(cached)] = rows
        for row, ids in enumerate(rows):
            own = [token for token in ids if token != 0]
            for prompt, answer in plans:
                if own[: len(prompt)] == prompt:
                    done = len(own) - len(prompt)
                    out.logits[row, -1] = -100.0
                    out.logits[row, -1, answer[done] if done < len(answer) else 5] = 100.0  # after its answer it babbles
        return out

    model.forward = says
    return model


def test_what_is_written_after_the_end_is_not_read(tokenizer):
    """One row stops early while another goes on: what the batch appends to the first must not get into its answer."""
    prompts = [row.plain for row in ANSWERS[:2]]
    model = obedient(tokenizer, {prompts[0]: " fox</s>", prompts[1]: " the fox and it is</s>"})
    model.generation_config.eos_token_id = None  # as in a model that never had one
    rows = [*ANSWERS[:1], replace(ANSWERS[1], completion=" the fox and it is")]
    [score] = score_tasks(model, tokenizer, [TaskSpec("t", rows)], batch_size=2)
    assert [item.prediction for item in score.items] == ["fox", "the fox and it is"]
    assert score.score == 1.0


def test_a_line_ends_an_answer_where_right_answers_have_one_line(tokenizer):
    prompt = ANSWERS[0].plain
    model = obedient(tokenizer, {prompt: " fox\nit is</s>"})
    one, two = replace(ANSWERS[0]), replace(ANSWERS[0], completion=" fox\nit is")
    [short] = score_tasks(model, tokenizer, [TaskSpec("t", [one])])
    [long] = score_tasks(model, tokenizer, [TaskSpec("t", [two])])
    assert (short.items[0].prediction, short.score) == ("fox", 1.0)
    assert (long.items[0].prediction, long.score) == ("fox\nit is", 1.0)


def test_the_batch_size_changes_no_score(model, chat_tokenizer):
    rows = [replace(row, index=i, prompt=(("user", f"{'the dog ' * (i % 5)}{row.plain}"),)) for i, row in enumerate(CHOICES * 4)]
    asked = [replace(row, index=i, prompt=(("user", f"{'the fox ' * (i % 5)}{row.plain}"),)) for i, row in enumerate(ANSWERS * 4)]
    tasks = [TaskSpec("choices", rows), TaskSpec("f1", asked, "f1"), TaskSpec("chrf", asked, "chrf")]
    first, *others = (score_tasks(model, chat_tokenizer, tasks, batch_size=size) for size in (1, 3, 16))
    assert len({item.prediction for item in first[1].items}) > 1
    for other in others:
        assert other == first


def test_bfloat16_choices_do_not_depend_on_the_batch_size_either(tokenizer):
    model = make_model(dtype="bfloat16")
    asked = [Asked(row.plain, choice) for row in CHOICES * 2 for choice in row.choices]
    with silence():
        assert local_model(model, tokenizer, 1).loglikelihood(asked) == local_model(model, tokenizer, 8).loglikelihood(asked)


def test_a_model_and_its_tokenizer_are_left_as_they_were(tokenizer):
    model = make_model().train()
    tokenizer.pad_token = None
    score_tasks(model, tokenizer, [TaskSpec("choices", CHOICES), TaskSpec("answers", ANSWERS)])
    assert model.training
    assert tokenizer.pad_token is None


def test_a_folder_is_scored_as_the_model_in_it(tmp_path, model, tokenizer):
    folder = save_model(model, tmp_path / "m", tokenizer=tokenizer)
    tasks = [TaskSpec("choices", CHOICES), TaskSpec("answers", ANSWERS, "f1")]
    assert score_tasks(*load.load_model(folder, device="cpu"), tasks) == score_tasks(model, tokenizer, tasks)
    with pytest.raises(CheckpointError):
        load.load_model(tmp_path)


@pytest.mark.parametrize("template", [False, True])
def test_no_tokens_are_added_to_a_rendered_text(model, template):
    """A tokenizer that puts <s> first by itself must not do so here: the model reads what it was trained on."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer(template=template)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert tokenizer("dog")["input_ids"][0] == 1
    seen = []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args or (kwargs["input_ids"],))[0]), with_kwargs=True)
    try:
        score_tasks(model, tokenizer, [TaskSpec("choices", CHOICES[:1]), TaskSpec("answers", ANSWERS[:1])])
    finally:
        hook.remove()
    whole = [ids[0].tolist() for ids in seen if ids.shape[1] > 4]
    prompts = [tokenizer(render(row, tokenizer).prompt, add_special_tokens=False)["input_ids"] for row in (CHOICES[0], ANSWERS[0])]
    assert [ids[: len(prompt)] for ids, prompt in zip(whole, prompts, strict=True)] == prompts


def test_a_choice_that_begins_another_is_scored_with_its_end(tokenizer):
    row = Row(0, (("user", "which?"),), " dog", (" dog", " dog and fox"))
    other = Row(1, (("user", "which?"),), " dog", (" dog", " fox"))
    first, second = define(TaskSpec("t", [row, other]), tokenizer).documents
    assert first["choices"] == [" dog</s>", " dog and fox</s>"]
    assert second["choices"] == [" dog", " fox"]


def test_a_definition_says_how_answers_end(chat_tokenizer):
    kwargs = define(TaskSpec("t", ANSWERS), chat_tokenizer).config["generation_kwargs"]
    assert kwargs["until"] == []
    assert kwargs["eos_token_id"] == [chat_tokenizer.eos_token_id]
    assert kwargs["do_sample"] is False
    chat_tokenizer.eos_token = "<pad>"  # the turn's end, </s>, is not the tokenizer's
    assert define(TaskSpec("t", ANSWERS), chat_tokenizer).config["generation_kwargs"]["eos_token_id"] == [0, 2]
    chat_tokenizer.eos_token = None
    with pytest.raises(CheckpointError, match="no end token"):
        define(TaskSpec("t", ANSWERS), chat_tokenizer)


def test_further_right_answers_count(model, tokenizer):
    [before] = score_tasks(model, tokenizer, [TaskSpec("t", ANSWERS)])
    said = before.items[2].prediction
    assert before.items[2].score == 0.0
    [after] = score_tasks(model, tokenizer, [TaskSpec("t", ANSWERS, answers={2: ["so", said]})])
    assert [item.score for item in after.items] == [item.score for item in before.items[:2]] + [1.0, before.items[3].score]


def test_scores_survive_json(model, tokenizer):
    scores = score_tasks(model, tokenizer, [TaskSpec("choices", CHOICES), TaskSpec("answers", ANSWERS, "f1")])
    assert [TaskScore.from_json(json.loads(json.dumps(asdict(score)))) for score in scores] == scores


def test_it_tells_of_every_answer_and_prints_nothing(model, tokenizer, capfd, caplog):
    told: list[tuple[str, int, list[int]]] = []

    class Listener:
        @contextmanager
        def stage(self, label, total, unit):
            told.append((label, total, []))
            yield told[-1][2].append

    with caplog.at_level(logging.INFO):
        score_tasks(model, tokenizer, [TaskSpec("choices", CHOICES), TaskSpec("answers", ANSWERS)], progress=Listener())
    choices = sum(len(row.choices) for row in CHOICES)
    assert [(label, total, sum(done)) for label, total, done in told] == [
        ("scoring choices", choices, choices),
        ("writing answers", len(ANSWERS), len(ANSWERS)),
    ]
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.name.startswith("lm_eval")]


def test_all_faults_of_tasks_are_found_at_once():
    mixed = [CHOICES[0], ANSWERS[1]]
    plain = [Row(0, (), "a text")]
    single = [Row(0, (("user", "?"),), "a", ("a",))]
    tasks = [
        TaskSpec("a", CHOICES), TaskSpec("a", ANSWERS), TaskSpec("mixed", mixed), TaskSpec("plain", plain), TaskSpec("single", single),
        TaskSpec("none", []), TaskSpec("wrong", CHOICES, "f1"), TaskSpec("misspelt", ANSWERS, "exact_mach"),
    ]  # fmt: skip
    faults = [str(fault) for fault in check_tasks(tasks)]
    assert len(faults) == 7
    for expected in (
        "two tasks are named 'a'",
        "some rows have choices and some have none\n  where: task 'mixed', row 2",
        "a row of plain text has no question to score an answer to\n  where: task 'plain', row 1",
        "a row's choices must be two or more",
        "there are no rows\n  where: task 'none'",
        "'f1' is not a metric of rows with choices\n  where: task 'wrong'\n  fix: known: acc, acc_norm",
        "did you mean 'exact_match'?",
    ):
        assert any(expected in fault for fault in faults), expected


def test_rows_that_the_model_cannot_hold_are_refused(model, tokenizer):
    long = [replace(row, prompt=(("user", "the dog " * 200),)) for row in CHOICES[1:2]]
    with pytest.raises(DataError, match=r"1 of 2 rows of 'long' are longer than the 256 tokens[^$]*'long', row 2"):
        score_tasks(model, tokenizer, [TaskSpec("long", [CHOICES[0], *long])])
    answer = replace(ANSWERS[1], completion="the dog " * 100)
    with pytest.raises(
        DataError, match=r"2 of 2 rows of 'a' are longer.*\n.*\n.*tokens kept free for its answer, .* that of row 2: a task of"
    ):
        score_tasks(model, tokenizer, [TaskSpec("a", [ANSWERS[0], answer])])
    edge = replace(ANSWERS[0], prompt=(("user", "!" * (256 - SPARE_TOKENS - 3)),))
    with pytest.raises(DataError, match="longer than the 256 tokens"):
        score_tasks(model, tokenizer, [TaskSpec("edge", [edge])])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_the_window_is_known_before_there_are_weights(bases, family, tmp_path):
    folder = shutil.copytree(bases(family), tmp_path / family, ignore=shutil.ignore_patterns("*.safetensors"))
    tokenizer = load_tokenizer(folder)
    local = LocalModel(load_model(bases(family)), tokenizer, batch_size=1, progress=Silent())
    assert window_of(folder, tokenizer) == local.max_length == 128
    long = [replace(row, prompt=(("user", "the dog " * 200),)) for row in CHOICES[1:2]]
    assert [fault.where for fault in check_lengths(folder, [TaskSpec("long", [CHOICES[0], *long])])] == ["task 'long', row 2"]


def test_an_exported_task_is_the_definition_itself(tmp_path, chat_tokenizer):
    file = export_task(TaskSpec("dogs & foxes", ANSWERS, "f1"), tmp_path, chat_tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dogs___foxes.jsonl", "dogs___foxes.yaml", "recall_scoring.py"]

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: f"function {node.value}")
    config = yaml.load(file.read_text(), Loader)
    assert config["process_results"] == "function recall_scoring.process_f1"
    assert config["task"] == "dogs & foxes"
    documents = [json.loads(line) for line in (tmp_path / "dogs___foxes.jsonl").read_text().split("\n") if line]
    assert documents == define(TaskSpec("t", ANSWERS, "f1"), chat_tokenizer).documents
    with pytest.raises(RunError, match="lm-eval's own"):
        export_task(TaskSpec("hellaswag"), tmp_path, chat_tokenizer)


@pytest.mark.parametrize("template", [False, True])
def test_lm_eval_by_itself_scores_an_exported_task_alike(tmp_path, model, template):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tokenizer = make_tokenizer(template=template)
    folder = save_model(model, tmp_path / "model", tokenizer=tokenizer)
    tasks = [TaskSpec("choices", CHOICES), TaskSpec("f1", ANSWERS, "f1"), TaskSpec("bleu", ANSWERS, "bleu")]
    for task in tasks:
        export_task(task, tmp_path / "tasks", tokenizer)
    ours = score_tasks(*load.load_model(folder), tasks)
    with silence():
        results = simple_evaluate(
            model="hf",
            model_args={"pretrained": str(folder), "dtype": "float32", "add_bos_token": False},
            tasks=[task.name for task in tasks],
            task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
            batch_size=3,
            device="cpu",
            bootstrap_iters=1,
        )
    assert results is not None
    for score in ours:
        assert results["results"][score.task][f"{score.metric},none"] == pytest.approx(score.score, abs=1e-12)
    assert results["results"]["choices"]["acc_stderr,none"] == pytest.approx(ours[0].stderr)
    said = [sample["filtered_resps"][0].strip().split("\n")[0].strip() for sample in results["samples"]["f1"]]
    assert said == [item.prediction for item in ours[1].items]


@pytest.mark.slow
def test_lm_evals_command_line_gives_the_same_score(tmp_path, model):
    tokenizer = make_tokenizer(template=True)
    folder = save_model(model, tmp_path / "model", tokenizer=tokenizer)
    tasks = [TaskSpec("choices", CHOICES), TaskSpec("numbers", ANSWERS, "last_number"), TaskSpec("chrf", ANSWERS, "chrf")]
    for task in tasks:
        export_task(task, tmp_path / "tasks", tokenizer)
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", "2"]
    command += ["--model_args", f"pretrained={folder},dtype=float32,add_bos_token=False", "--output_path", str(tmp_path / "out")]
    command += ["--include_path", str(tmp_path / "tasks"), "--tasks", ",".join(task.name for task in tasks)]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    [written] = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(written.read_text())["results"]
    for score in score_tasks(*load.load_model(folder), tasks):
        assert results[score.task][f"{score.metric},none"] == pytest.approx(score.score, abs=1e-12)


@pytest.fixture
def named(tmp_path, monkeypatch, tokenizer):
    """lm-eval with tasks of its own: those of a folder in place of the ten thousand that it has."""
    from lm_eval.tasks import TaskManager

    for task in (TaskSpec("choices", CHOICES), TaskSpec("f1", ANSWERS, "f1"), TaskSpec("more", CHOICES[:2])):
        export_task(task, tmp_path / "tasks", tokenizer)
    members = "task: [choices, more]\naggregate_metric_list:\n- {metric: acc, weight_by_size: true}\n"
    (tmp_path / "tasks" / "both.yaml").write_text(f"group: both\n{members}")
    (tmp_path / "tasks" / "far.yaml").write_text("task: far\ntag: distant\ndataset_path: nobody/nothing\noutput_type: multiple_choice\n")
    (tmp_path / "tasks" / "farther.yaml").write_text("include: far.yaml\ntask: farther\n")
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    monkeypatch.setattr("recall_merge.evaluation.tasks.task_manager", lambda: manager)


def test_a_task_of_lm_evals_is_asked_by_its_name(named, model, tokenizer):
    own = score_tasks(model, tokenizer, [TaskSpec("choices", CHOICES), TaskSpec("f1", ANSWERS, "f1")])
    theirs = score_tasks(model, tokenizer, [TaskSpec("f1"), TaskSpec("choices")])
    assert [score.task for score in theirs] == ["f1", "choices"], "the order of the tasks"
    for ours, score in zip(own, reversed(theirs), strict=True):
        assert (score.metric, score.n, dict(score.others)) == (ours.metric, ours.n, dict(ours.others))
        assert (score.score, score.stderr) == (ours.score, pytest.approx(ours.stderr))
        lines = [replace(item, prediction=item.prediction.split("\n")[0].strip()) for item in score.items]  # lm-eval keeps all of them
        assert lines == list(ours.items)
    [other] = score_tasks(model, tokenizer, [TaskSpec("choices", metric="acc_norm")], limit=2)
    assert (other.metric, other.n, set(other.others)) == ("acc_norm", 2, {"acc"})
    with pytest.raises(RunError, match=r"has no metric 'acc_nrom'\n  fix: did you mean 'acc_norm'\?"):
        score_tasks(model, tokenizer, [TaskSpec("choices", metric="acc_nrom")])


def test_a_group_of_lm_evals_has_one_score_over_its_tasks(named, model, tokenizer):
    [both, rows] = score_tasks(model, tokenizer, [TaskSpec("both"), TaskSpec("rows", CHOICES)])
    right = [item.score for item in rows.items]
    assert [item.id for item in both.items] == [f"choices/{i}" for i in range(4)] + [f"more/{i}" for i in range(2)]
    assert [item.score for item in both.items] == right + right[:2]
    assert both.score == pytest.approx(sum(right + right[:2]) / 6)
    assert both.n == 6


def test_a_name_that_means_no_one_task_is_refused(named, model, tokenizer):
    with pytest.raises(RunError) as caught:
        score_tasks(model, tokenizer, [TaskSpec("choces"), TaskSpec("distant"), TaskSpec("zzz")])
    first, second, third = map(str, caught.value.faults)
    assert "no task 'choces'" in first
    assert "did you mean 'choices'?" in first
    assert "'distant' is a tag" in second
    assert "far, farther" in second
    assert "did you mean" not in third
    with pytest.raises(DataError, match=r"lm-eval cannot load its tasks[^$]*where: far"):
        score_tasks(model, tokenizer, [TaskSpec("far")])


def test_the_names_are_those_of_the_installed_lm_eval():
    [fault] = check_tasks([TaskSpec("hellaswag"), TaskSpec("helaswag"), TaskSpec("rows", CHOICES)])
    assert fault.what == "lm-eval has no task 'helaswag', and there is no such file"
    assert "did you mean 'hellaswag'?" in fault.fix
