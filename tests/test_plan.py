"""Every fault of a run is told before any work, all at once, and the disk stays as it was."""

import json
import os
import shutil
import struct
from datetime import datetime
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from recall_merge import MergeRun, RecallError, make_plan, merge
from recall_merge.files.ownership import claim
from recall_merge.merging.cost import estimate_time, peak_memory
from recall_merge.merging.merge import merge_in_memory
from recall_merge.runtime.parallel import cores
from tiny import edit_json, fine_tuned, load_tensors, lora, make_model, make_tokenizer, save_model, write_rows

ROWS = [{"prompt": f"is the fox {word}?", "completion": " yes"} for word in ("quick", "lazy", "good", "bad")]


@pytest.fixture
def world(llama, tmp_path):
    """A folder with a base, two experts and rows, and the description of a run over them that has no fault."""
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    for seed, name in enumerate("ab"):
        fine_tuned(base, tmp_path / name, seed=seed + 1)
    write_rows(tmp_path / "rows.jsonl", ROWS)
    return tmp_path


def a_run(world, **changes):
    run = {
        "base": str(world / "base"),
        "experts": [{"name": name, "path": str(world / name)} for name in "ab"],
        "method": "recall",
        "samples": {"path": str(world / "rows.jsonl"), "count": 2},
        "out": {"path": world / "out"},
    }
    return MergeRun.model_validate(run | changes)


def disk(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def faults_of(world, **changes) -> list[tuple[str, str, str]]:
    """The faults of a merge that is refused, after checking that nothing was written."""
    run, before = a_run(world, **changes), disk(world)
    with pytest.raises(RecallError) as caught:
        merge(run)
    assert disk(world) == before
    assert sorted(path.name for path in world.iterdir()) == sorted({path.split("/")[0] for path in before})
    assert all(fault.what for fault in caught.value.faults)
    return [(fault.what, fault.where, fault.fix) for fault in caught.value.faults]


def one_fault(world, **changes) -> tuple[str, str, str]:
    found = faults_of(world, **changes)
    assert len(found) == 1, found
    return found[0]


def test_a_sound_run_has_a_plan(world):
    plan = make_plan(a_run(world))
    numbers = sum(tensor.numel() for tensor in load_tensors(world / "base").values())
    assert plan.bytes_written == 4 * numbers
    assert plan.bytes_read == 3 * 4 * numbers
    assert plan.single_pass
    assert peak_memory(plan) > 0
    assert plan.base.layers.blocks == 2
    assert next(iter(plan.specs)) == "model.embed_tokens.weight"
    assert {"model.norm.weight", "lm_head.weight"} == set(list(plan.specs)[-2:])
    assert estimate_time(plan).seconds > 0
    assert not (world / "out").exists()


def test_all_faults_come_at_once(world):
    (world / "a" / "config.json").write_text("{")
    write_rows(world / "rows.jsonl", [{"question": "?"}])
    (world / "out").mkdir()
    (world / "out" / "mine.txt").write_text("mine")
    found = faults_of(world, options={"temprature": 2, "kernel": "rfb"})
    text = "\n".join(" | ".join(fault) for fault in found)
    for part in (
        "temprature",
        "did you mean 'temperature'",
        "there is no kernel 'rfb' | options | did you mean 'rbf'?",
        "accepted forms",
        "config.json cannot be read",
        "output folder is not empty",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    ("changes", "what", "fix"),
    [
        ({"method": "recal"}, "there is no method 'recal'", "did you mean 'recall'?"),
        ({"method": "linear", "options": {"scal": 1}}, "method 'linear' has no option 'scal'", "did you mean 'scale'?"),
        ({"method": "linear", "options": {"scale": "big"}}, "'scale'", "it is 'big' now"),
        ({"method": "linear", "weights": [1.0]}, "there are 1 weights for 2 experts", "one number per expert"),
        ({"method": "linear", "weights": [0.0, 0.0]}, "not all 0", ""),
        ({"weights": [0.5, 0.5]}, "`method: recall` has weights of its own", "give `method: linear` with `weights`"),
        ({"samples": None}, "`samples` are missing", "add `samples"),
        ({"options": {"temperature": 0}}, "'temperature'", "it is 0 now"),
        ({"options": {"bandwidth": "mean"}}, "'bandwidth'", "it is 'mean' now"),
        ({"skip": ["*.nothing"]}, "`skip` names no tensor: '*.nothing'", "pattern"),
        ({"out": {}}, "the run does not say where the result goes", "--out"),
    ],
)
def test_what_the_run_says(world, changes, what, fix):
    found = faults_of(world, **changes)
    assert any(what in fault[0] and fix in fault[2] for fault in found), found


def test_missing_models_are_all_named(world):
    found = faults_of(world, experts=[{"name": name, "path": str(world / f"no-{name}")} for name in "ab"])
    assert len(found) == 2
    assert all(f"no-{name}" in " ".join(fault) for name, fault in zip("ab", found, strict=True))


def test_base_listed_as_an_expert(world):
    what, _, fix = one_fault(world, experts=[{"name": "a", "path": str(world / "a")}, {"name": "b", "path": str(world / "base")}])
    assert what == "expert 'b' is the base itself"
    assert "fine-tuned from the base" in fix
    shutil.copytree(world / "base", world / "copy")
    assert one_fault(world, experts=[{"name": "c", "path": str(world / "copy")}])[0] == "expert 'c' is the base itself"


def test_expert_listed_twice(world):
    what, where, _ = one_fault(world, experts=[{"name": "a", "path": str(world / "a")}, {"name": "b", "path": str(world / "a")}])
    assert what == "experts 'a' and 'b' are the same folder"
    assert where == str(world / "a")


def test_names_taken_twice():
    entries = [{"name": "a", "path": "x"}, {"name": "a", "path": "y"}]
    with pytest.raises(ValueError, match="the name 'a' is taken twice"):
        MergeRun.model_validate({"base": "b", "experts": entries, "method": "linear"})


@pytest.mark.parametrize(
    ("family", "settings", "what"),
    [
        ("qwen2", {}, "model_type 'qwen2'; the base has 'llama'"),
        ("llama", {"num_hidden_layers": 3}, "num_hidden_layers 3; the base has 2"),
        ("llama", {"hidden_size": 64}, "hidden_size 64; the base has 32"),
        ("llama", {"intermediate_size": 48}, "intermediate_size 48; the base has 64"),
        ("llama", {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "rope_parameters.rope_theta 500000.0"),
    ],
)
def test_another_architecture(world, family, settings, what):
    save_model(make_model(family, seed=3, **settings), world / "other")
    found = faults_of(world, experts=[{"name": "other", "path": str(world / "other")}])
    assert any(what in fault[0] and fault[0].startswith("expert 'other' has") for fault in found), found


def test_missing_extra_and_reshaped_tensors(world):
    tensors = load_tensors(world / "a")
    gone, grown = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    del tensors[gone]
    tensors[grown] = torch.zeros(65, 32)
    tensors["model.layers.0.more.weight"] = torch.zeros(2)
    save_file(tensors, world / "a" / "model.safetensors", metadata={"format": "pt"})
    found = [fault[0] for fault in faults_of(world)]
    assert f"expert 'a' lacks tensor '{gone}'" in found
    assert "expert 'a' has the extra tensor 'model.layers.0.more.weight'" in found
    assert f"expert 'a' has '{grown}' of shape (65, 32); the base has (64, 32)" in found
    merge(a_run(world, method="linear", skip=["*.up_proj.weight", "*.more.weight"]))  # the run says what to do


def test_dtypes_that_differ_need_a_word(world):
    model = make_model("llama", dtype="bfloat16", seed=5)
    save_model(model, world / "half")
    entries = [{"name": "half", "path": str(world / "half")}]
    what, _, fix = one_fault(world, experts=entries)
    assert what == "expert 'half' is in bfloat16, the base in float32"
    assert "dtype: bfloat16" in fix
    make_plan(a_run(world, experts=entries, out={"path": world / "out", "dtype": "float32"}))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["recall", "linear"])
def test_numbers_that_are_not_finite(world, poison, method):
    for name in "ab":
        tensors = load_tensors(world / name)
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = poison
        tensors["model.norm.weight"][2] = poison
        save_file(tensors, world / name / "model.safetensors", metadata={"format": "pt"})
    found = faults_of(world, method=method, samples={"path": str(world / "rows.jsonl")} if method == "recall" else None)
    assert [fault[0] for fault in found] == [
        f"expert '{name}' holds NaN or infinity in '{tensor}'"
        for tensor in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight")
        for name in "ab"
    ]


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_difference_that_overflows_is_not_called_infinity_of_the_files(world, kind):
    """3e38 - -3e38, or a product of factors of 1e20: every number of the files is finite."""
    if kind == "full":
        for name, sign in (("base", -1), ("a", 1)):
            tensors = load_tensors(world / name)
            tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = sign * 3e38
            save_file(tensors, world / name / "model.safetensors", metadata={"format": "pt"})
        where = world / "a"
    else:
        where = lora(world / "base", world / "factors", r=2, target_modules=["up_proj"], layers_to_transform=[1])
        factors = {name: torch.full_like(tensor, 1e20) for name, tensor in load_file(where / "adapter_model.safetensors").items()}
        save_file(factors, where / "adapter_model.safetensors", metadata={"format": "pt"})
    entries = [{"name": "a", "path": str(where)}]
    what, place, _ = one_fault(world, method="linear", samples=None, experts=entries)
    assert what == "expert 'a' changes 'model.layers.1.mlp.up_proj.weight' by more than float32 can hold, from finite numbers"
    assert place == str(where)


def test_a_merge_that_overflows_its_dtype(world):
    tensors = load_tensors(world / "a")
    tensors["model.norm.weight"] += 1e6
    save_file(tensors, world / "a" / "model.safetensors", metadata={"format": "pt"})
    what, _, fix = one_fault(world, method="linear", samples=None, change_limit=None, out={"path": world / "out", "dtype": "float16"})
    assert what == "the merge overflows F16 in 'model.norm.weight'"
    assert "float32" in fix


def poisoned(world, tensor, numbers):
    """The same numbers in one tensor of base and experts, whose deltas of it are zero."""
    for name in ("base", "a", "b"):
        tensors = load_tensors(world / name)
        tensors[tensor].view(-1)[: len(numbers)] = torch.tensor(numbers)
        save_file(tensors, world / name / "model.safetensors", metadata={"format": "pt"})


NORM = "model.norm.weight"


@pytest.mark.parametrize("skip", [{}, {"skip": [NORM]}])
def test_every_number_that_is_written_is_looked_at(world, skip):
    settings = {"method": "linear", "samples": None} | skip
    poisoned(world, NORM, [70000.0])
    what, _, fix = one_fault(world, **settings, out={"path": world / "out", "dtype": "float16"})
    assert what == f"{'the base' if skip else 'the merge'} overflows F16 in '{NORM}'" and "`out.dtype: float32`" in fix
    merge(a_run(world, **settings))
    shutil.rmtree(world / "out")
    poisoned(world, NORM, [torch.nan])
    what, where, _ = one_fault(world, **settings)
    assert what == f"the base holds NaN{'' if skip else ' or infinity'} in '{NORM}'" and where == str(world / "base")
    assert not (world / "out").exists()


def test_infinity_that_the_base_has_is_kept_where_the_run_says_so(world):
    """As in a mask. Where another dtype would make further numbers infinite, the merge is refused."""
    mask = torch.tensor([[0.0, -torch.inf], [0.0, 0.0]])
    for name in ("base", "a", "b"):
        save_file(load_tensors(world / name) | {"model.layers.0.mask": mask}, world / name / "model.safetensors", metadata={"format": "pt"})
    settings = {"method": "linear", "samples": None, "skip": ["*.mask"], "out": {"path": world / "out", "dtype": "float16"}}
    merged, _ = merge_in_memory(make_plan(a_run(world, **settings)))
    assert torch.equal(merged["model.layers.0.mask"], mask.half())
    poisoned(world, "model.layers.0.mask", [-1e30])
    assert one_fault(world, **settings)[0] == "the base overflows F16 in 'model.layers.0.mask'"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "there are no rows"),
        ('{"prompt": "a"', "this is not JSON"),
        ('{"prompt": "a"}', "field `completion` must be text, it is missing"),
        ('{"prompt": 3, "completion": "b"}', "field `prompt` must be text, it is int"),
        ('{"prompt": "a", "completion": "b", "choices": ["c"]}', "is not among its choices"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "the last of the turns must be the assistant's"),
        ("[1]", "a row must be an object"),
    ],
)
def test_rows(world, text, what):
    (world / "rows.jsonl").write_text(text + "\n")
    found, where, _ = one_fault(world)
    assert what in found
    assert "rows.jsonl" in where


def test_rows_without_text(world):
    write_rows(world / "rows.jsonl", [{"prompt": "", "completion": " "}])
    assert one_fault(world)[0] == "no row has any text"


@pytest.mark.parametrize("place", ["base", "a", ".", "base/inner"])
def test_output_over_an_input(world, place):
    what, _, _ = one_fault(world, out={"path": world / place, "overwrite": True})
    assert "the output would lie in, or over, the folder of" in what


def test_overwrite_spares_what_is_no_model(world):
    (world / "out").mkdir()
    (world / "out" / "thesis.tex").write_text("years of work")
    assert "is no model that recall-merge made" in one_fault(world, out={"path": world / "out", "overwrite": True})[0]


@pytest.mark.parametrize("what", ["the rows", "the statistics of a"])
def test_output_over_rows_or_statistics(world, what):
    """Both lie in a result that may be replaced, and are on its list: only that the run reads them protects them."""
    out = world / "out"
    out.mkdir()
    shutil.copy(world / "rows.jsonl", out)
    claim(out, "model", whole=True, files=["rows.jsonl"])
    changes = {"samples": {"path": str(out / "rows.jsonl")}} if what == "the rows" else {}
    changes |= {"experts": [{"name": name, "path": str(world / name), "stats": str(out)} for name in "ab"]} if "statistics" in what else {}
    found = faults_of(world, out={"path": out, "overwrite": True}, **changes)
    assert [f"the output would lie in, or over, {what}"] == [fault for fault, *_ in found if "would lie" in fault]


def test_too_little_disk(world, monkeypatch):
    import recall_merge.merging.plan as module

    monkeypatch.setattr(module, "free_bytes", lambda target: 1000)
    what, _, fix = one_fault(world)
    assert "bytes of disk, 1,000 are free" in what
    assert "make room" in fix


def test_shrunken_after_the_plan(world):
    """A file that is cut after its header was read is refused when its bytes are missed, and nothing is left."""
    from recall_merge.merging.merge import apply

    plan = make_plan(a_run(world, method="linear", samples=None))
    file = world / "b" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(RecallError, match=r"the file ended .* bytes early"):
        apply(plan)
    assert not (world / "out").exists()
    assert not (world / "out.partial").exists()


def test_a_header_that_lies(world):
    file = world / "a" / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 10**9) + file.read_bytes()[8:])
    (world / "b" / "model.safetensors").write_bytes(b"")
    found = faults_of(world)
    assert any("the header claims 1000000000 bytes" in fault[0] for fault in found)
    assert any("at least 8 bytes, this one has 0" in fault[0] for fault in found)


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def cut(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])


def empty(folder):
    (folder / WEIGHTS).write_bytes(b"")


def garble(folder):
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[8:40] = b"\xff" * 32
    (folder / WEIGHTS).write_bytes(data)


def overlap(folder):
    data = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    same = [name for name in names if header[name]["shape"] == header[names[-1]]["shape"]]
    header[same[0]]["data_offsets"] = header[same[-1]]["data_offsets"]
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def no_weights(folder):
    (folder / WEIGHTS).unlink()


def pickled(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def missing_shard(folder):
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    files = {"model.norm.weight": "model-00001-of-00002.safetensors", "lm_head.weight": "model-00002-of-00002.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))


def index_outside(folder):
    (folder / WEIGHTS).rename(folder.parent / "stolen.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "../stolen.safetensors"}}))


def two_models(folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": WEIGHTS}}))


def no_config(folder):
    (folder / "config.json").unlink()


def quantised(folder):
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq"})


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (cut, "the header describes"),
        (empty, "at least 8 bytes"),
        (garble, "the header is not"),
        (overlap, "overlap or leave holes"),
        (no_weights, "there are no weights in this folder"),
        (pickled, "the weights are pickled (pytorch_model.bin)"),
        (missing_shard, "the index names 'model-00002-of-00002.safetensors', which is missing"),
        (index_outside, "the index names '../stolen.safetensors'"),
        (two_models, "the folder holds two models"),
        (no_config, "there is no config.json"),
        (quantised, "quantised"),
    ],
)
@pytest.mark.parametrize("victim", ["base", "a"])
def test_damaged_models_are_refused_before_anything_is_written(world, damage, what, victim):
    damage(world / victim)
    found = faults_of(world)
    told = [fault for fault in found if what in fault[0]]
    assert told, found
    assert all(str(world / victim) in fault[1] and fault[2] for fault in told)


def test_adapter_of_another_base(world):
    other = save_model(make_model("llama", seed=9), world / "other-base")
    lora(other, world / "c", r=2, target_modules=["q_proj"])
    what, _, fix = one_fault(world, experts=[{"name": "c", "path": str(world / "c")}])
    assert "another base" in what or "base" in what
    assert "same_base: true" in fix
    make_plan(a_run(world, experts=[{"name": "c", "path": str(world / "c"), "same_base": True}]))


# --- vocabularies ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def grown(world):
    """An expert with two tokens more than the base, at the end of longer token tensors; and one with two tokens swapped."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>", "<tool>"])
    for name, rows in (("a", 98),):
        tensors = load_tensors(world / name)
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            more = torch.arange(2 * 32, dtype=torch.float32).reshape(2, 32) / 64
            tensors[key] = torch.cat([tensors[key], more])
        save_file(tensors, world / name / "model.safetensors", metadata={"format": "pt"})
        edit_json(world / name / "config.json", vocab_size=rows)
        tokenizer.save_pretrained(world / name)
    return world


def test_vocabularies_that_differ_need_a_word(grown):
    what, _, fix = one_fault(grown)
    assert what == "expert 'a' has 98 rows of tokens; the base has 96"
    assert "`vocabulary: base`, `newest` or `union`" in fix


def test_a_tokenizer_that_all_models_share_is_not_interpreted_but_must_be_whole(world, monkeypatch):
    monkeypatch.setattr("recall_merge.files.vocabulary.read_vocabulary", lambda folder: pytest.fail(f"{folder} was read"))
    make_plan(a_run(world, method="linear", samples=None))
    for name in ("base", "a", "b"):
        path = world / name / "tokenizer.json"
        path.write_text(path.read_text()[:-10])
    what, where, _ = one_fault(world, method="linear", samples=None)
    assert what.startswith("tokenizer.json cannot be read") and where == str(world / "base" / "tokenizer.json")


def test_tokens_at_other_ids_need_a_word(world):
    path = world / "b" / "tokenizer.json"
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    first, second = [token for token in vocabulary if token.isalpha()][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(data))
    what, _, _ = one_fault(world)
    assert what.startswith("expert 'b' has another tokenizer: ")
    out = {"path": world / "out"}
    merge(a_run(world, method="linear", samples=None, vocabulary="base", out=out))
    key = "model.embed_tokens.weight"
    start, ours, theirs, found = (load_tensors(world / name)[key] for name in ("base", "a", "b", "out"))
    rows = list(range(len(start)))
    one, two = vocabulary[first], vocabulary[second]
    rows[one], rows[two] = two, one  # b's rows, by token
    torch.testing.assert_close(found, start + 0.5 * (ours - start) + 0.5 * (theirs[rows] - start))


@pytest.mark.parametrize("choice", ["base", "newest", "union"])
def test_the_three_vocabularies(grown, choice):
    experts = [{"name": name, "path": str(grown / name)} for name in "ba"]  # the newest is the one that has more tokens
    merge(a_run(grown, experts=experts, vocabulary=choice, options={"scale": 1.0}))
    from transformers import AutoTokenizer

    from recall_merge.models.load import build_model

    found, expert, base = (load_tensors(grown / name) for name in ("out", "a", "base"))
    key = "lm_head.weight"
    assert len(found[key]) == (96 if choice == "base" else 98)
    tokenizer = AutoTokenizer.from_pretrained(grown / "out")
    assert (tokenizer.convert_tokens_to_ids("<tool>") == 97) is (choice != "base")
    if choice != "base":  # only 'a' knows the two tokens: its rows are taken whole, not thinned by those who never saw them
        torch.testing.assert_close(found[key][96:], expert[key][96:])
    weights = json.loads((grown / "out" / "record.json").read_text())["weights"]["rows"][-1]
    b, a = load_tensors(grown / "b")[key], expert[key][:96]
    torch.testing.assert_close(found[key][:96], base[key] + weights[0] * (b - base[key]) + weights[1] * (a - base[key]))
    build_model(grown / "out")


def test_cores_where_the_system_does_not_tell_which_are_to_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert cores() == 3


def test_whole_numbers_that_differ_are_not_dropped_in_silence(world):
    table = torch.arange(8).reshape(4, 2)
    for name, own in (("base", table), ("a", table), ("b", table + 1)):
        save_file(load_tensors(world / name) | {"model.layers.0.table": own}, world / name / "model.safetensors", metadata={"format": "pt"})
    what, _, fix = one_fault(world, method="linear")
    assert what == "expert 'b' has other numbers in 'model.layers.0.table' (int64 (4, 2)), and whole numbers cannot be merged"
    assert "`skip:`" in fix
    merge(a_run(world, method="linear", skip=["model.layers.0.table"]))
    assert torch.equal(load_tensors(world / "out")["model.layers.0.table"], table)


REFUSING = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}"
)
SYSTEM = {"role": "system", "content": "be kind"}
TURNS = [[{"role": "user", "content": f"is {i}?"}, {"role": "assistant", "content": "yes"}] for i in range(6)]
CHATS = [{"messages": [SYSTEM, *turns] if i % 2 else turns} for i, turns in enumerate(TURNS)]


def with_template(world, template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    for name in ("base", "a", "b"):
        tokenizer.save_pretrained(world / name)


@pytest.mark.parametrize("method", ["recall", "lm_cocktail"])
def test_rows_that_the_template_refuses_are_told_in_the_plan(world, method):
    with_template(world, REFUSING)
    rows = write_rows(world / "rows.jsonl", CHATS)
    what, where, _ = one_fault(world, method=method)
    assert (what, where) == ("the chat template refuses the row: no system role", f"{rows}, row 2, row 4, row 6")
    assert make_plan(a_run(world, method="linear")).texts == []


def test_rows_with_roles_are_told_in_the_plan_where_there_is_no_template(world):
    write_rows(world / "rows.jsonl", CHATS)
    assert "needs a chat template" in one_fault(world)[0]


def test_the_same_run_gives_the_same_bytes_on_another_day(world, monkeypatch):
    with_template(world, "{{ strftime_now('%d %b %Y') }} {% for m in messages %}{{ m.content }}</s>{% endfor %}")
    found = []
    for day in ("2026-01-01", "2026-12-24"):
        clock = type("Clock", (datetime,), {"now": classmethod(lambda cls, day=day: datetime.fromisoformat(day))})
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", clock)
        result = merge(a_run(world, out={"path": world / day}))
        assert any("always 26 Jul 2024" in note for note in result.notes)
        found.append((world / day / "model.safetensors").read_bytes())
    assert found[0] == found[1]
