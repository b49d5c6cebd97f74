"""The files beside the weights, beside what transformers loads from the model that they come from."""

import json
import shutil

import pytest
from transformers import AutoTokenizer, GenerationConfig

from recall_merge import MergeRun, RecallError, make_plan, merge
from recall_merge.files.companions import chat_template, write_settings
from recall_merge.files.vocabulary import Vocabulary
from tiny import TEMPLATE, edit_json, fine_tuned, lora, make_model, make_tokenizer, quiet, save_model

CHAT = [{"role": "user", "content": "is it good"}]


def chatty():
    """The base's tokenizer with a template, and another end token; its `tokenizer.json` is the same."""
    tokenizer = make_tokenizer(template=True)
    tokenizer.eos_token = "<pad>"
    return tokenizer


@pytest.fixture
def world(tmp_path):
    """A base without a chat template; a full expert and an adapter that were taught to chat; an expert that was not."""
    base = save_model(make_model("llama", vocab_size=100), tmp_path / "base")
    full = fine_tuned(base, tmp_path / "full", seed=1)
    chatty().save_pretrained(full)
    edit_json(full / "config.json", eos_token_id=0)
    edit_json(full / "generation_config.json", eos_token_id=[0, 2])
    chatty().save_pretrained(lora(base, tmp_path / "adapter", r=2, target_modules=["q_proj"]))
    fine_tuned(base, tmp_path / "plain", seed=2)
    return tmp_path


def a_run(world, *experts, vocabulary=None, **out):
    entries = [{"name": name, "path": str(world / name)} for name in experts]
    run = {"base": str(world / "base"), "experts": entries, "method": "linear", "out": {"path": world / "out"} | out}
    return MergeRun.model_validate(run | ({"vocabulary": vocabulary} if vocabulary else {}))


def speaks(folder):
    """The prompt of a chat, the end token, and where generation stops, as transformers reads them."""
    with quiet():
        tokenizer, generation = AutoTokenizer.from_pretrained(folder), GenerationConfig.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(CHAT, tokenize=False) if tokenizer.chat_template else None
    return prompt, tokenizer.eos_token, generation.eos_token_id


@pytest.mark.parametrize(
    ("experts", "settings", "speaker"),
    [
        (("plain", "full"), {}, "base"),
        (("plain", "full"), {"chat_template": "base", "vocabulary": "newest"}, "base"),
        (("plain", "full"), {"vocabulary": "newest"}, "full"),
        (("plain", "full"), {"chat_template": "newest"}, "full"),
        (("full", "plain"), {"chat_template": "full"}, "full"),
        (("full", "plain"), {"chat_template": "newest"}, "plain"),
        (("plain", "adapter"), {"vocabulary": "newest"}, "adapter"),
        (("adapter", "plain"), {"chat_template": "adapter"}, "adapter"),
    ],
)
def test_template_and_end_tokens_come_from_one_model(world, experts, settings, speaker):
    merge(a_run(world, *experts, **settings))
    theirs = ("<s>user\nis it good</s>\n", "<pad>", [0, 2])  # an adapter's end token, and the base's beside it
    wanted = theirs if speaker == "adapter" else speaks(world / speaker)
    assert speaks(world / "out") == wanted
    config = json.loads((world / "out" / "config.json").read_text())
    assert config["eos_token_id"] == {"full": 0, "adapter": [0, 2]}.get(speaker, 2)


def test_a_speaker_without_a_generation_config_stops_where_its_config_says(world):
    (world / "full" / "generation_config.json").unlink()
    edit_json(world / "base" / "generation_config.json", temperature=0.5, do_sample=True)
    merge(a_run(world, "full", chat_template="full"))
    found = json.loads((world / "out" / "generation_config.json").read_text())
    assert found["eos_token_id"] == 0 and found["temperature"] == 0.5


def test_a_template_alone_goes_with_the_tokenizer_of_the_base(world):
    for file in world.joinpath("adapter").glob("*token*"):
        file.unlink()
    merge(a_run(world, "adapter", vocabulary="newest"))
    assert speaks(world / "out") == ("<s>user\nis it good</s>\n", "</s>", 2)


def test_what_is_not_taken_is_said(world):
    assert make_plan(a_run(world, "plain")).notes == []
    other = "has its own chat template and end tokens; the result has the base's: `out.chat_template: full` takes the expert's"
    [note] = make_plan(a_run(world, "plain", "full")).notes
    assert note == f"expert 'full' {other}"
    assert "adapter" in make_plan(a_run(world, "adapter", "plain")).notes[0]
    assert make_plan(a_run(world, "full", chat_template="base")).notes == []


def test_a_template_for_tokens_that_the_result_lacks_is_refused(world):
    tokenizer = chatty()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(world / "full")
    with pytest.raises(RecallError, match="the result does not have the tokens of 'full'"):
        make_plan(a_run(world, "full", "plain", chat_template="full", vocabulary="base"))
    with pytest.raises(RecallError, match="the result does not have the tokens of 'full'"):
        make_plan(a_run(world, "full", "plain", chat_template="full", vocabulary="union"))
    with pytest.raises(RecallError, match="there is no expert 'ful'") as error:
        make_plan(a_run(world, "full", "plain", chat_template="ful", vocabulary="base"))
    assert "full" in error.value.faults[0].fix
    merge(a_run(world, "plain", "full", vocabulary="newest"))
    assert speaks(world / "out") == speaks(world / "full")


def test_samples_are_read_with_the_template_of_the_result(world):
    from recall_merge.merging.forward import expert_tokenizer

    plan = make_plan(a_run(world, "plain", "full", chat_template="full"))
    assert expert_tokenizer(plan, plan.experts[0]).chat_template == TEMPLATE == chat_template(world / "full")
    plan = make_plan(a_run(world, "plain", "full"))
    assert expert_tokenizer(plan, plan.experts[-1]).chat_template is None


def test_all_that_servers_need_comes_along_and_nothing_else(world):
    base = world / "base"
    needed = {"video_preprocessor_config.json", "tekken.json", "tiktoken.model", "sentencepiece.bpe.model", "LICENSE", "NOTICE.txt"}
    needed |= {"preprocessor_config.json", "configuration_own.py", "params.json", "modules.json"}
    left = {"training_args.bin", "pytorch_model.bin", "old.gguf", ".gitattributes", "trainer_state.json", "stats.json", "old.index.json"}
    for name in needed | left:
        (base / name).write_text("{}")
    before = {file.name for file in base.iterdir()}
    merge(a_run(world, "plain"))
    after = {file.name for file in (world / "out").iterdir()}
    assert after >= needed and not after & left
    assert before - after == left
    assert after - before == {".recall-merge", "README.md", "record.json"}


def test_a_tokenizer_that_cannot_be_read_must_be_the_same_file(world):
    for name in ("base", "plain"):
        for file in world.joinpath(name).glob("*token*"):
            file.unlink()
        (world / name / "tekken.json").write_text('{"vocab": []}')
    merge(a_run(world, "plain"))
    (world / "plain" / "tekken.json").write_text('{"vocab": [1]}')
    shutil.rmtree(world / "out")
    with pytest.raises(RecallError, match=r"expert 'plain' has another tekken\.json than the base"):
        make_plan(a_run(world, "plain"))


@pytest.mark.parametrize("part", ["text_config", "llm_config", "language_config"])
def test_the_number_of_tokens_is_written_where_the_config_has_it(world, part):
    config = json.loads((world / "base" / "config.json").read_text())
    (world / "base" / "config.json").write_text(json.dumps({part: config, "model_type": "llama"}))
    (world / "out").mkdir()
    write_settings(world / "out", world / "base", [], Vocabulary(7, (), world / "full"), None, world / "full")
    assert json.loads((world / "out" / "config.json").read_text())[part]["vocab_size"] == 7


def with_tokens(folder, *tokens):
    """Another tokenizer for a model: the usual one with more tokens."""
    tokenizer = make_tokenizer(template=True)
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(folder)


PANIC = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}], "pair": [], "special_tokens": {}}


@pytest.mark.parametrize(
    ("model", "file", "changes", "settings", "words"),
    [
        ("full", "tokenizer_config.json", {"tokenizer_class": 3}, {"vocabulary": "union"}, "no usable tokenizer"),
        ("base", "tokenizer_config.json", {"padding_side": "middle"}, {"vocabulary": "union"}, "no usable tokenizer"),
        ("plain", "tokenizer_config.json", {"eos_token": 5}, {"vocabulary": "union"}, "no usable tokenizer"),
        ("base", "tokenizer_config.json", {"chat_template": {"a": 3}}, {"vocabulary": "union"}, "the base's tokenizer cannot be saved"),
        ("full", "tokenizer.json", {"post_processor": PANIC}, {"vocabulary": "union"}, "no usable tokenizer: no entry found for key"),
        ("full", "generation_config.json", None, {"vocabulary": "newest"}, "generation_config.json cannot be read"),
        (
            "plain",
            "generation_config.json",
            None,
            {"vocabulary": "base", "chat_template": "plain"},
            "generation_config.json cannot be read",
        ),
        ("full", "tokenizer_config.json", None, {"vocabulary": "newest"}, "tokenizer_config.json cannot be read"),
        ("base", "generation_config.json", {"pad_token_id": "x"}, {"vocabulary": "union"}, "the result could not be loaded"),
        ("base", "generation_config.json", {"watermarking_config": 3}, {"reload": True}, "the result could not be loaded"),
        ("full", "config.json", {"pad_token_id": 5000}, {"vocabulary": "newest"}, "the result could not be loaded.*Padding_idx"),
    ],
)
def test_what_the_result_could_not_be_loaded_or_written_with_is_a_fault_of_the_plan(world, model, file, changes, settings, words):
    if "vocabulary" in settings:
        with_tokens(world / "full", "<new>")
    if changes is None:
        (world / model / file).write_text("{")
    else:
        edit_json(world / model / file, **changes)
    with pytest.raises(RecallError, match=words) as error:
        make_plan(a_run(world, "plain", "full", **settings))
    assert all(fault.where.startswith(str(world)) and fault.fix for fault in error.value.faults), error.value
