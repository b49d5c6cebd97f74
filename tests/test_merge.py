"""The main job, whole: what is merged equals an independent computation, in every family, from checkpoints and adapters."""

import asyncio
import json
import re
import shutil
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
import transformers

from recall_merge import MergeRun, RecallError, merge, verify
from tiny import FAMILIES, fine_tuned, load_model, load_tensors, lora, make_model, make_tokenizer, merged_by_peft, save_model, write_rows

ROWS = [
    {"prompt": f"is the {word} {verb}?", "completion": f" {answer}"}
    for word in ("fox", "dog", "film")
    for verb in ("quick", "lazy", "good")
    for answer in ("yes", "no")
]
LINEARS = {"gpt2": ["c_attn", "c_proj"], "neox": ["query_key_value", "dense"], "phi3": ["qkv_proj", "down_proj"]}


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", ROWS)


@pytest.fixture(scope="session")
def two(bases, tmp_path_factory):
    """`two("gpt2")`: a base and two full experts, made once."""
    made = {}

    def of(family: str) -> tuple[Path, Path, Path]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            base = bases(family)
            made[family] = (base, fine_tuned(base, folder / "a", seed=1), fine_tuned(base, folder / "b", seed=2))
        return made[family]

    return of


def a_run(base, experts, target, **settings):
    entries = [{"name": name, "path": str(path)} for name, path in experts.items()]
    return MergeRun.model_validate({"base": str(base), "experts": entries, "method": "linear", "out": {"path": target}} | settings)


def layer_of(name: str, blocks: int) -> int:
    """Written for these families alone, and unlike the library's own way."""
    inside = re.search(r"\.(?:layers|h)\.(\d+)\.", name)
    if inside:
        return int(inside[1]) + 1
    return 0 if re.search(r"embed_tokens|wte|wpe|embed_in", name) else blocks + 1


def expected(base, experts, weights, blocks):
    """sum in the order of the experts, in float32: base + w_a (a - base) + w_b (b - base)."""
    merged = {}
    for name, tensor in load_tensors(base).items():
        total = tensor.clone()
        for expert, weight in zip(experts, weights[layer_of(name, blocks)], strict=True):
            total = torch.add(total, expert[name] - tensor, alpha=weight)
        merged[name] = total
    return merged


@pytest.mark.parametrize("family", FAMILIES)
def test_recall_equals_plain_torch_from_the_records_weights(family, two, rows, tmp_path):
    base, a, b = two(family)
    result = merge(a_run(base, {"a": a, "b": b}, tmp_path / "out", method="recall", samples={"path": str(rows), "count": 4}))

    record = json.loads((tmp_path / "out" / "record.json").read_text())
    weights = record["weights"]["rows"]
    blocks = len(weights) - 2
    assert record["weights"]["experts"] == ["a", "b"]
    assert record["weights"]["layers"] == list(range(blocks + 2))
    assert all(sum(row) == pytest.approx(1, abs=1e-12) for row in weights)
    assert len({tuple(row) for row in weights}) > 1  # representations differ with layer, so layers must not be mixed up
    found, wanted = load_tensors(tmp_path / "out"), expected(base, [load_tensors(a), load_tensors(b)], weights, blocks)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name
    assert torch.equal(result.weights, torch.tensor(weights, dtype=torch.float64))

    model = load_model(tmp_path / "out")
    generated = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert generated.shape == (1, 7)
    verify(tmp_path / "out")


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_equal_pefts_own_merge_of_each(family, bases, rows, tmp_path):
    base = bases(family)
    targets = LINEARS.get(family, ["q_proj", "o_proj"])
    experts = {name: lora(base, tmp_path / name, seed=seed, r=4, lora_alpha=8, target_modules=targets) for seed, name in enumerate("ab")}
    merge(a_run(base, experts, tmp_path / "out", method="recall", samples={"path": str(rows), "count": 4}))

    dense = [load_tensors(merged_by_peft(base, folder, tmp_path / f"{name}-merged")) for name, folder in experts.items()]
    weights = json.loads((tmp_path / "out" / "record.json").read_text())["weights"]["rows"]
    wanted = expected(base, dense, weights, len(weights) - 2)
    found = load_tensors(tmp_path / "out")
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert (found[name] - wanted[name]).norm() <= 1e-6 * wanted[name].norm(), name


def test_what_no_expert_changes_keeps_its_bytes(bases, tmp_path):
    base = save_model(make_model("llama", dtype="bfloat16"), tmp_path / "base")
    expert = lora(base, tmp_path / "a", r=2, target_modules=["q_proj"])
    merge(a_run(base, {"a": expert}, tmp_path / "out", method="task_arithmetic"))
    before, after = load_tensors(base), load_tensors(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "q_proj" in name}


def test_given_weights_and_task_arithmetic_by_hand(two, tmp_path):
    base, a, b = two("llama")
    merge(a_run(base, {"a": a, "b": b}, tmp_path / "linear", weights=[3, 1]))
    merge(a_run(base, {"a": a, "b": b}, tmp_path / "sum", method="task_arithmetic", options={"scale": 0.5}))
    tensors = [load_tensors(folder) for folder in (base, a, b, tmp_path / "linear", tmp_path / "sum")]
    for name, start in tensors[0].items():
        ours, theirs = tensors[1][name] - start, tensors[2][name] - start
        torch.testing.assert_close(tensors[3][name], start + 0.75 * ours + 0.25 * theirs)
        torch.testing.assert_close(tensors[4][name], start + 0.5 * (ours + theirs))


def tensor_bytes(folder: Path) -> dict[str, bytes]:
    return {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in load_tensors(folder).items()}


def test_same_bytes_whatever_the_threads_shards_and_repeats(two, rows, tmp_path):
    base, a, b = two("gemma2")
    outs = {}
    for label, threads, shard in (("one", 1, "5GB"), ("again", 1, "5GB"), ("two", 2, "5GB"), ("shards", 2, "20KB")):
        out = {"path": tmp_path / label, "shard_size": shard}
        merge(a_run(base, {"a": a, "b": b}, tmp_path, method="recall", samples={"path": str(rows), "count": 3}, threads=threads, out=out))
        outs[label] = tensor_bytes(tmp_path / label)
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    assert not (tmp_path / "shards" / "model.safetensors").exists()
    assert all(found == outs["one"] for found in outs.values())
    load_model(tmp_path / "shards")


def test_shards_in_and_dtype_out(two, tmp_path):
    base, a, b = two("llama")
    model = load_model(base)
    sharded = save_model(model, tmp_path / "sharded", max_shard_size="30KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    for start, label in ((base, "whole"), (sharded, "parts")):
        merge(a_run(start, {"a": a, "b": b}, tmp_path, out={"path": tmp_path / label, "dtype": "bfloat16"}))
    whole, parts = load_tensors(tmp_path / "whole"), load_tensors(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) and whole[name].dtype == torch.bfloat16 for name in whole)
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["dtype"] == "bfloat16"
    merge(a_run(base, {"a": a, "b": b}, tmp_path / "full"))
    full = load_tensors(tmp_path / "full")
    assert all(torch.equal(full[name].bfloat16(), whole[name]) for name in full)  # rounded once, at the end


def test_single_expert_has_the_base_in_its_pool(two, rows, tmp_path):
    base, a, _ = two("llama")
    result = merge(a_run(base, {"a": a}, tmp_path / "out", method="recall", samples={"path": str(rows)}))
    assert result.models == ("base", "a")
    assert ((result.weights[:, 1] >= 0.5) & (result.weights[:, 1] <= 0.7311)).all()  # between 1/2 and e / (e + 1)


def test_identical_experts_weigh_the_same(two, rows, tmp_path):
    base, a, _ = two("llama")
    shutil.copytree(a, tmp_path / "copy")
    result = merge(a_run(base, {"a": a, "copy": tmp_path / "copy"}, tmp_path / "out", method="recall", samples={"path": str(rows)}))
    assert torch.equal(result.similarity, torch.ones_like(result.similarity))
    assert torch.equal(result.weights, torch.full_like(result.weights, 0.5))


def test_companions_come_along(two, tmp_path):
    base, a, _ = two("llama")
    base = Path(shutil.copytree(base, tmp_path / "base"))
    make_tokenizer(template=True).save_pretrained(base)
    (base / "modeling_own.py").write_text("raise SystemExit('never run')")
    (base / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"_name_or_path": "/home/somebody/base"}))
    merge(a_run(base, {"a": a}, tmp_path / "out"))
    out = tmp_path / "out"
    for file in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "modeling_own.py"):
        assert (out / file).read_bytes() == (base / file).read_bytes(), file
    published = "".join((out / file).read_text() for file in ("config.json", "README.md", "record.json"))
    assert str(tmp_path) not in published
    assert "/home/somebody" not in published


def test_card_is_what_the_hub_reads(two, rows, tmp_path):
    from huggingface_hub import ModelCard

    base, a, b = two("llama")
    base = Path(shutil.copytree(base, tmp_path / "base"))
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\n---\n# Base\n")
    merge(a_run(base, {"a": a, "b": b}, tmp_path / "out", method="recall", samples={"path": str(rows)}))
    stats = ModelCard.load(tmp_path / "out" / "README.md")
    assert stats.data.tags == ["merge", "recall-merge", "recall"]
    assert (stats.data.license, stats.data.language, stats.data.base_model_relation) == ("apache-2.0", ["en"], "merge")
    assert "| layer | a | b |" in stats.text


def test_skip_keeps_the_base(two, tmp_path):
    base, a, _ = two("llama")
    merge(a_run(base, {"a": a}, tmp_path / "out", skip=["*norm.weight", "lm_head.weight"]))
    start, full, found = load_tensors(base), load_tensors(a), load_tensors(tmp_path / "out")
    for name in start:
        kept = name.endswith("norm.weight") or name == "lm_head.weight"
        torch.testing.assert_close(found[name], start[name] if kept else full[name], msg=name)


def test_overwriting_replaces_the_whole_model(two, tmp_path):
    base, a, b = two("llama")
    out = tmp_path / "out"
    merge(a_run(base, {"a": a}, out))
    first = tensor_bytes(out)
    with pytest.raises(RecallError, match="not empty"):
        merge(a_run(base, {"b": b}, out))
    assert tensor_bytes(out) == first
    merge(a_run(base, {"b": b}, out, out={"path": out, "overwrite": True, "shard_size": "20KB"}))
    assert not (out / "model.safetensors").exists()  # a loader would take it before the shards
    torch.testing.assert_close(load_tensors(out)["lm_head.weight"], load_tensors(b)["lm_head.weight"])
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_a_change_of_one_bit_is_found(two, tmp_path):
    base, a, _ = two("llama")
    merge(a_run(base, {"a": a}, tmp_path / "out"))
    file = tmp_path / "out" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    with pytest.raises(RecallError, match=r"'model.safetensors' has changed since the merge"):
        verify(tmp_path / "out")


def test_progress_and_interruption_leave_nothing(two, tmp_path):
    """Stopped in the middle of the pass over the parameters, a merge leaves neither a folder nor a thread."""
    from contextlib import contextmanager

    base, a, _ = two("llama")
    seen = []

    class Stop(BaseException):
        pass

    class Listener:
        @contextmanager
        def stage(self, label, total, unit):
            done = 0

            def advance(amount):
                nonlocal done
                done += amount
                seen.append((label, done, total, unit))
                if done > total // 2:
                    raise Stop

            yield advance

    threads = threading.active_count()
    with pytest.raises(Stop):
        merge(a_run(base, {"a": a}, tmp_path / "out", threads=2), progress=Listener())
    assert seen[0][0] == "merging by linear"
    assert seen[0][3] == "bytes"
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == threads


def test_result_reports_rows_that_were_left_out(two, tmp_path):
    base, a, b = two("llama")
    data = write_rows(tmp_path / "rows.jsonl", [*ROWS, ROWS[0], {"prompt": " ", "completion": ""}])
    result = merge(a_run(base, {"a": a, "b": b}, tmp_path / "out", method="recall", samples={"path": str(data), "count": 30}))
    assert f"2 of {len(ROWS) + 2} rows are empty or repeat another and were left out" in result.notes
    assert any("no more than the 30 samples asked for" in note for note in result.notes)
    assert [sample["row"] for sample in result.record["samples"]] == list(range(len(ROWS)))


def test_merges_in_threads_at_the_same_time_give_the_same_bytes_and_leave_the_process_as_it_was(two, rows, tmp_path):
    """As `asyncio.to_thread` runs them: one in float32, one in bfloat16, again and again, none waiting for the other."""
    base, a, b = two("llama")
    run = {"samples": {"path": str(rows), "count": 3}, "threads": 2}
    runs = {precision: run | {"weights": {"recall": {"precision": precision}}} for precision in ("float32", "bfloat16")}

    def merged(precision, label):
        merge(a_run(base, {"a": a, "b": b}, tmp_path / f"{precision}-{label}", **runs[precision]))
        return tensor_bytes(tmp_path / f"{precision}-{label}")

    def state():
        noise = transformers.utils.logging
        filters, bars = [*warnings.filters], noise.is_progress_bar_enabled()
        return torch.nn.Module.register_parameter, torch.get_default_dtype(), torch.get_num_threads(), noise.get_verbosity(), bars, filters

    async def both(label):
        return await asyncio.gather(*(asyncio.to_thread(merged, precision, label) for precision in runs))

    alone, before = [merged(precision, "alone") for precision in runs], state()
    for label in range(3):
        assert asyncio.run(both(label)) == alone
        assert state() == before


def test_a_change_to_the_process_is_undone_by_the_last_thread_out():
    """The first one in leaves before the second: neither may put back what the other has set."""
    from recall_merge.evaluation.lm_eval_private import silence
    from recall_merge.models.load import hushed
    from recall_merge.runtime.parallel import one_thread

    def state():
        return torch.get_num_threads(), transformers.utils.logging.get_verbosity(), [*warnings.filters], sys.stdout

    torch.set_num_threads(2)
    try:
        before = state()
        for change in (hushed, one_thread, silence):
            first, second = change(), change()
            first.__enter__()
            during = state()
            second.__enter__()
            first.__exit__(None, None, None)
            assert state() == during != before
            second.__exit__(None, None, None)
            assert state() == before
    finally:
        torch.set_num_threads(1)
