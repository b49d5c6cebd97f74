"""The promises that matter, kept on the real small model (make test-slow)."""

import json
import subprocess
import sys

import pytest
import torch
import yaml

from recall_merge import MergeRun, merge, verify
from recall_merge.demo.smollm import unpack
from recall_merge.evaluation.evaluate import evaluate
from recall_merge.evaluation.tasks import SPARE_TOKENS
from recall_merge.files.rows import read_rows
from recall_merge.models.load import load_tokenizer
from recall_merge.models.tokens import NO_LABEL, encode_rows
from tiny import load_model, load_tensors, lora, merged_by_peft, quiet, write_rows

pytestmark = pytest.mark.slow

WORDS = ["river", "executor", "letter", "garden", "number", "window", "market", "doctor"]
ROWS = [{"prompt": f"Is a {one} like a {two}? Answer yes or no.", "completion": "no"} for one in WORDS for two in WORDS if one != two]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    base = unpack(folder / "base")
    for seed, name in enumerate("ab"):
        lora(base, folder / name, seed=seed, r=8, lora_alpha=16, target_modules="all-linear", scale=0.01)
    write_rows(folder / "rows.jsonl", ROWS)
    return folder


def a_run(world, target, **settings):
    run = {
        "base": str(world / "base"),
        "experts": [{"name": name, "path": str(world / name)} for name in "ab"],
        "method": "recall",
        "samples": {"path": str(world / "rows.jsonl"), "count": 8},
        "out": {"path": world / target, "dtype": "float32"},
    }
    return MergeRun.model_validate(run | settings)


def test_threads_and_shards_do_not_change_a_byte(world):
    one = merge(a_run(world, "one", threads=1))
    two = merge(a_run(world, "two", threads=2, out={"path": world / "two", "dtype": "float32", "shard_size": "100MB"}))
    assert torch.equal(one.similarity, two.similarity)
    first, second = load_tensors(world / "one"), load_tensors(world / "two")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    verify(world / "two")


def test_adapters_equal_pefts_own_merge(world):
    result = merge(a_run(world, "merged"))
    dense = [load_tensors(merged_by_peft_float32(world, name)) for name in "ab"]
    base, found = load_tensors(world / "base"), load_tensors(world / "merged")
    for name, tensor in base.items():
        layer = int(name.split(".")[2]) + 1 if ".layers." in name else 0 if "embed" in name else 31
        start = tensor.float()
        wanted = start + sum(w * (full[name] - start) for w, full in zip(result.weights[layer].tolist(), dense, strict=True))
        assert (found[name] - wanted).norm() <= 1e-6 * wanted.norm(), name


def merged_by_peft_float32(world, name):
    """PEFT merges in the base's dtype; in bfloat16 that alone would be an error of a thousandth."""
    base = world / "base-float32"
    if not base.exists():
        with quiet():
            load_model(world / "base", dtype="float32").save_pretrained(base)
    return merged_by_peft(base, world / name, world / f"{name}-merged")


def test_tokens_labels_logits_and_scores_are_those_of_trl_peft_and_lm_eval(world, tmp_path):
    """The same rows and the same adapter through the other tools alone: trl's dataset, PEFT's merge, lm-eval's command line."""
    right = {"Is snow white?": "yes", "Is a river a letter?": "no", "Can a doctor read a number?": "yes", "Is coal white?": "no"}
    choices = [{"prompt": asked, "completion": said, "choices": ["yes", "no"]} for asked, said in right.items()]
    answers = [{"prompt": f"Write a line about a {word}.", "completion": word} for word in WORDS[:4]]
    rows = [read_rows(write_rows(tmp_path / f"{name}.jsonl", made)) for name, made in (("choices", choices), ("answers", answers))]
    run = {"experts": [{"name": "a", "path": str(world / "a")}], "method": "linear", "samples": None}
    merge(a_run(world, "alone", **run, out={"path": world / "alone", "dtype": "float32"}))
    tokenizer = load_tokenizer(world / "alone")

    encoded = encode_rows([*rows[0], *rows[1]], tokenizer)
    by_trl = tokenized_by_trl([*choices, *answers], world / "base", tmp_path / "trl")
    assert [row.input_ids for row in encoded] == [row["input_ids"] for row in by_trl]
    assert [row.labels for row in encoded] == [row["labels"] for row in by_trl]

    merged_by_peft_float32(world, "a")
    ours, theirs = (load_model(world / name, dtype="float32") for name in ("alone", "a-merged"))
    with torch.no_grad():
        for row in encoded:
            ids = torch.tensor([row.input_ids])
            wanted = theirs(ids).logits
            assert (ours(ids).logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()

    longest = max(len(row.labels) - row.labels.count(NO_LABEL) for row in encoded[len(choices) :])
    written, said = scored_by_lm_eval(world / "a-merged", world / "alone", tmp_path, longest + SPARE_TOKENS)
    for score in evaluate(str(world / "alone"), [str(tmp_path / f"{name}.jsonl") for name in ("choices", "answers")]):
        measured = {score.metric: score.score} | {name: value for name, value in score.others.items() if name == "acc_norm"}
        assert {name: written[score.task][f"{name},none"] for name in measured} == pytest.approx(measured, abs=1e-12)
    assert [item.prediction for item in score.items] == said and all(said)


def tokenized_by_trl(records, base, folder):
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    turns = [
        {"prompt": [{"role": "user", "content": row["prompt"]}], "completion": [{"role": "assistant", "content": row["completion"]}]}
        for row in records
    ]
    with quiet():
        arguments = SFTConfig(output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, max_length=None)
        tokenizer = AutoTokenizer.from_pretrained(base)
        return SFTTrainer(load_model(base), arguments, train_dataset=Dataset.from_list(turns), processing_class=tokenizer).train_dataset


def scored_by_lm_eval(model, tokenizer, folder, tokens):
    """lm-eval's command line, its own rendering and its own tasks over the files of rows."""
    shared = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{prompt}}", "target_delimiter": "", "num_fewshot": 0}
    choices = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "{{choices.index(completion)}}"}
    choices["metric_list"] = [{"metric": "acc"}, {"metric": "acc_norm"}]
    answers = {"output_type": "generate_until", "doc_to_target": "completion", "metric_list": [{"metric": "exact_match"}]}
    answers["generation_kwargs"] = {"until": ["\n"], "do_sample": False, "max_gen_toks": tokens}
    answers["filter_list"] = [{"name": "none", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}]
    for name, kind in {"choices": choices, "answers": answers}.items():
        task = {"task": name, "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}, **shared, **kind}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "--model",
        "hf",
        "--device",
        "cpu",
        "--apply_chat_template",
        "--output_path",
        folder / "out",
    ]
    command += ["--model_args", f"pretrained={model},tokenizer={tokenizer},dtype=float32"]
    command += ["--include_path", folder, "--tasks", "choices,answers", "--log_samples"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, cwd=folder)
    [written] = (folder / "out").rglob("results_*.json")
    [samples] = (folder / "out").rglob("samples_answers_*.jsonl")
    said = {sample["doc_id"]: sample["filtered_resps"][0] for sample in map(json.loads, samples.read_text().splitlines())}
    return json.loads(written.read_text())["results"], [said[row].strip() for row in sorted(said)]
