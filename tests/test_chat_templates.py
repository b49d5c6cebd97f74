"""Chat templates as they are published: training labels beside trl's, and scores of a model that is forced to the right answer."""

import ast
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers
import trl
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils
from trl.data_utils import common_prefix_length

from recall_merge.evaluation.lm_eval_private import silence
from recall_merge.evaluation.scores import score_tasks
from recall_merge.evaluation.tasks import TaskSpec
from recall_merge.files.rows import Row, parse_rows
from recall_merge.models.tokens import DATE, encode_rows, render
from recall_merge.runtime.errors import DataError
from tiny import forced, make_model

FOLDER = Path(trl.__file__).parent / "chat_templates"
PUBLISHED = {file.stem: file.read_text("utf-8") for file in sorted(FOLDER.glob("*.jinja"))}
REFUSED = ("idefics3", "llava_next", "smolvlm", "transformers smolvlm")  # they take no plain text


def in_modules_of_transformers() -> dict[str, str]:
    """The chat templates that stand in transformers' own code."""
    models, found = Path(transformers.__file__).parent / "models", {}
    for name in ("llama4/processing_llama4", "qwen2_audio/processing_qwen2_audio", "smolvlm/processing_smolvlm"):
        for node in ast.walk(ast.parse((models / f"{name}.py").read_text("utf-8"))):
            if isinstance(node, ast.Constant) and "{% for message in messages" in str(node.value).replace("{%-", "{%"):
                found[f"transformers {name.partition('/')[0]}"] = str(node.value)
    assert len(found) == 3
    return found


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
AFTER_FAMILIES = {
    "chatml": CHATML + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "chatml without a generation prompt": CHATML,
    "llama2": "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}",
    "alpaca": "{% for m in messages %}{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n{% else %}### Response:\n"
    "{{ m.content }}{{ eos_token }}\n\n{% endif %}{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}",
    "vicuna": "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "zephyr": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "mistral": "{% set ns = namespace(s='') %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.s = m.content %}"
    "{% elif m.role == 'user' %}[INST] {% if loop.last and ns.s %}{{ ns.s }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "empty reasoning": "{% for m in messages %}<s>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>"
    "\n\n{% endif %}{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}",
    "open reasoning": "{% for m in messages %}<s>{{ m.role }}\n{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}"
    "</s>{% endfor %}{% if add_generation_prompt %}<s>assistant\n<think>\n{% endif %}",
    "upper header": "{% for m in messages %}<{{ m.role | upper }}>{{ m.content | trim }}</{{ m.role | upper }}>{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<ASSISTANT>{% endif %}",
    "turns without separators": "{% for m in messages %}{{ m.role + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}",
    "marked for training": "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
}
TEMPLATES = PUBLISHED | in_modules_of_transformers() | AFTER_FAMILIES
FAITHFUL = [name for name in TEMPLATES if name.removesuffix("_training") not in REFUSED]
WORDS = ["dog", "the fox", "think", "<"]
SAID = ["the dog", "the fox\nis it\n\ngood", "t", "<", "assistant"]


@cache
def bytes_and_words():
    """A tokenizer that can write anything."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["is the dog there? the fox is good, assistant"], trainer)
    return tokenizer


def chat(name: str):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_and_words(), pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer


def clock(day: datetime) -> type[datetime]:
    return type("Clock", (datetime,), {"now": classmethod(lambda cls: day)})


@pytest.fixture(autouse=True)
def day_of_templates(monkeypatch):
    """transformers and trl render as on the day that ours is."""
    monkeypatch.setattr(chat_template_utils, "datetime", clock(DATE))


def conversation(row):
    return [{"role": role, "content": content} for role, content in row.prompt], [{"role": "assistant", "content": row.completion}]


@pytest.mark.parametrize("name", FAITHFUL)
def test_a_row_is_learnt_as_trl_learns_it_but_for_what_the_template_opens_an_answer_with(name):
    tokenizer = chat(name)
    rows = parse_rows([{"prompt": f"is it {i}?", "completion": said} for i, said in enumerate(SAID)], where="rows")
    for row, encoded in zip(rows, encode_rows(rows, tokenizer), strict=True):
        asked, answer = conversation(row)
        theirs = tokenizer.apply_chat_template(asked + answer, return_dict=True)["input_ids"]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert encoded.input_ids == theirs
        start = encoded.labels.count(-100)
        assert encoded.labels == [-100] * start + theirs[start:]
        opened = tokenizer.decode(theirs[common_prefix_length(prompt, theirs) : start])
        learnt = tokenizer.decode(theirs[start:])
        assert learnt.strip().startswith(row.completion)
        assert row.completion not in opened or row.completion in ("t", "<", "assistant"), opened
        if not any(word in TEMPLATES[name] for word in ("think", "channel", "to=user")) and "add_generation_prompt" in TEMPLATES[name]:
            assert not opened.strip()


@pytest.mark.parametrize("name", [name for name in FAITHFUL if not name.endswith("_training")])
def test_a_model_that_is_forced_to_the_right_answer_scores_one(name):
    tokenizer = chat(name)
    answers = parse_rows([{"prompt": f"is it {i}?", "completion": said} for i, said in enumerate(SAID)], where="rows")
    choices = parse_rows([{"prompt": f"which {i}?", "completion": word, "choices": WORDS} for i, word in enumerate(WORDS)], where="rows")
    texts = [tokenizer.apply_chat_template([*asked, *said], tokenize=False) for asked, said in map(conversation, [*answers, *choices])]
    model = forced(tokenizer, texts)
    scores = score_tasks(model, tokenizer, [TaskSpec("answers", answers), TaskSpec("acc", choices), TaskSpec("norm", choices, "acc_norm")])
    assert [(score.score, [item.prediction for item in score.items]) for score in scores] == [(1.0, SAID), (1.0, WORDS), (1.0, WORDS)]


def as_lm_eval_asks(rows: list[Row], tokenizer: Any, model: Any, until: str = "") -> dict[str, Any]:
    """lm-eval's own rendering (`--apply_chat_template`) and scores of the same rows, by its own model: metrics, and what was answered."""
    documents = [
        {"q": row.plain, "a": row.choices.index(row.completion) if row.choices else row.completion, "c": row.choices} for row in rows
    ]
    kind: dict[str, Any] = {
        "output_type": "multiple_choice",
        "doc_to_choice": "c",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    if not rows[0].choices:
        generation = {"until": [until or "</s>"], "do_sample": False, "max_gen_toks": 40}
        kind = {"output_type": "generate_until", "generation_kwargs": generation, "metric_list": [{"metric": "exact_match"}]}
    config = {
        "task": "rows",
        "doc_to_text": "q",
        "doc_to_target": "a",
        "target_delimiter": "",
        "test_split": "test",
        "num_fewshot": 0,
        **kind,
    }
    config["custom_dataset"] = lambda **_: {"test": Dataset.from_list(documents)}
    with silence():
        task = ConfigurableTask(config=config)
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
        results = evaluate(lm, {"rows": task}, apply_chat_template=True, bootstrap_iters=0)
    answers = [sample["filtered_resps"] for sample in results["samples"]["rows"]]
    return {**{name.partition(",")[0]: value for name, value in results["results"]["rows"].items()}, "answers": answers}


@pytest.mark.parametrize("name", [name for name in FAITHFUL if not name.endswith("_training")])
def test_scores_are_those_of_lm_eval_by_itself_where_it_asks_the_same(name):
    """Not where a template writes something before an answer, which lm-eval leaves out."""
    tokenizer = chat(name)
    answers = parse_rows([{"prompt": f"is it {i}?", "completion": said} for i, said in enumerate(["the dog", "good"])], where="rows")
    choices = parse_rows([{"prompt": f"which {i}?", "completion": word, "choices": WORDS} for i, word in enumerate(WORDS)], where="rows")
    texts = [tokenizer.apply_chat_template([*asked, *said], tokenize=False) for asked, said in map(conversation, [*answers, *choices])]
    prompts = [tokenizer.apply_chat_template(conversation(row)[0], tokenize=False, add_generation_prompt=True) for row in choices]
    if [render(row, tokenizer)[:2] for row in choices] != list(zip(prompts, WORDS, strict=True)):
        pytest.skip("lm-eval asks for the answer without what the template writes before it")
    for model in (forced(tokenizer, texts), make_model(vocab_size=len(tokenizer), max_position_embeddings=4096)):
        [ours] = score_tasks(model, tokenizer, [TaskSpec("c", choices)])
        theirs = as_lm_eval_asks(choices, tokenizer, model)
        assert (ours.score, ours.others["acc_norm"]) == (theirs["acc"], theirs["acc_norm"])
        picked = [WORDS[max(range(len(WORDS)), key=lambda c, given=given: given[c][0])] for given in theirs["answers"]]
        assert [item.prediction for item in ours.items] == picked
    theirs = as_lm_eval_asks(
        answers, tokenizer, forced(tokenizer, texts), until=render(answers[0], tokenizer).end.partition("</s>")[0].strip()
    )
    [ours] = score_tasks(forced(tokenizer, texts), tokenizer, [TaskSpec("a", answers)])
    assert ours.score == 1
    if name != "turns without separators":  # lm-eval is not told of the end token, and reads it
        assert [given[0].strip() for given in theirs["answers"]] == [item.prediction for item in ours.items]


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_takes_no_plain_text_is_refused_with_every_row(name):
    rows = parse_rows([{"prompt": "is it?", "completion": said} for said in [*SAID, "yes", "no"]], where="rows")
    with pytest.raises(DataError, match=r"the chat template (leaves out the answer|refuses the row)") as refused:
        encode_rows(rows, chat(name))
    assert [fault.where for fault in refused.value.faults] == ["row 1, row 2, row 3, row 4, row 5 and 2 more"]


def test_a_system_turn_stays_where_a_template_writes_it_only_before_an_answer():
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "is it?"}, {"role": "assistant", "content": "yes"}]
    [row] = parse_rows([{"messages": turns}], where="rows")
    assert render(row, chat("mistral")) == ("[INST] be brief\n\nis it?[/INST]", "yes", "</s>")


def test_reasoning_that_a_row_has_is_its_own_words():
    [row] = parse_rows([{"prompt": "is it?", "completion": "<think>\nsure\n</think>\n\nyes"}], where="rows")
    assert render(row, chat("qwen3")).answer == row.completion
    with pytest.raises(DataError, match="leaves out the answer, or changes it"):
        render(row, chat("deepseek_r1_distill"))


CHAT = {"messages": [{"role": "user", "content": "is it?"}, {"role": "assistant", "content": "yes"}]}


@pytest.mark.parametrize("template", [None, "off"])
@pytest.mark.parametrize(
    "record", [CHAT, {"instruction": "Is it?", "output": "yes"}, {"prompt": "is it?", "system": "be brief", "completion": "yes"}]
)
def test_roles_are_refused_without_a_template(record, template):
    tokenizer = chat("chatml")
    if template is None:
        tokenizer.chat_template = None
    rows = parse_rows([record, {"prompt": "is it?", "completion": " yes"}], where="rows")
    with pytest.raises(
        DataError, match=r"needs a chat template, .*\n  where: row 1\n  fix: give a Jinja file, `template: FILE`"
    ) as refused:
        encode_rows(rows, tokenizer, template=template is None)
    assert len(refused.value.faults) == 1
    assert render(rows[1], tokenizer, template=False) == ("is it?", " yes", "</s>")
    assert encode_rows(rows, chat("chatml"))


DATED = "<s>system\nToday is {{ strftime_now('%d %b %Y') }}, {% set f = '%A %-d/%m/%y' %}{{ strftime_now(f) }}</s>\n" + CHATML
INDENTED = "  {% for m in messages %}  {{ m.content }}\n  {% endfor %}{% if false %}{{ strftime_now('%Y') }}{% endif %}"


@pytest.mark.parametrize("name", ["gptoss", "llama3_2", "dated", "indented"])
def test_a_date_is_the_same_on_any_day(name, monkeypatch):
    """The reference is transformers' own rendering on that day."""
    tokenizer = chat("chatml")
    tokenizer.chat_template = {"dated": DATED, "indented": INDENTED}.get(name) or PUBLISHED[name]
    [row] = parse_rows([{"prompt": "is it?", "completion": "yes"}], where="rows")
    found = []
    for day in (DATE, datetime(2026, 12, 24)):
        monkeypatch.setattr(chat_template_utils, "datetime", clock(day))
        found.append("".join(render(row, tokenizer)))
        if day == DATE:
            assert found[0] == tokenizer.apply_chat_template([part for turns in conversation(row) for part in turns], tokenize=False)
    assert found[0] == found[1]
