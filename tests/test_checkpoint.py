"""Model folders: read by header, whatever their shards; everything that is wrong with one is said before any of it is used."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from recall_merge.files.checkpoint import INDEX, SINGLE, block_count, open_checkpoint, read_json
from recall_merge.files.hashing import same_weights
from recall_merge.files.safetensors import RemoteFile, TensorSpec
from recall_merge.files.same_architecture import named_like
from recall_merge.runtime.errors import CheckpointError
from tiny import FAMILIES, edit_json, fine_tuned, load_model, load_tensors, make_model, save_model


@pytest.fixture
def folder(llama, tmp_path):
    """A copy of a model in one file, to be damaged."""
    return shutil.copytree(llama, tmp_path / "model")


@pytest.fixture
def shards(tmp_path):
    """A model in several files, to be damaged."""
    return save_model(make_model("llama"), tmp_path / "shards", max_shard_size=40_000)


def write(folder, **tensors):
    """Replace the tensors of a model in one file; those given are changed, `None` takes one out."""
    new = load_tensors(folder) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in new.items() if tensor is not None}, folder / SINGLE, metadata={"format": "pt"})


def refusal(folder, what, fix, *, where=None):
    """The text of the error that a folder is refused with; one of its faults says this, of this place, with this fix."""
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(folder)
    [fault] = [fault for fault in error.value.faults if what in fault.what]
    assert Path(fault.where) == (folder if where is None else folder / where)
    assert fix in fault.fix
    return str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_every_family(bases, family):
    checkpoint, tensors = open_checkpoint(bases(family)), load_tensors(bases(family))
    assert checkpoint.tensors.keys() == tensors.keys()
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())
    assert checkpoint.specs == {name: TensorSpec("F32", tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert checkpoint.dtypes == {"float32"} and checkpoint.vocabulary_size == 96
    assert checkpoint.layers.blocks == block_count(checkpoint.config) == (3 if family.startswith("gemma") else 2)
    model = make_model(family)
    assert torch.equal(checkpoint.read(checkpoint.embedding), model.get_input_embeddings().weight)
    assert len(checkpoint.token_tensors) == (1 if model.config.tie_word_embeddings else 2)
    assert torch.equal(checkpoint.read(checkpoint.token_tensors[-1]), model.get_output_embeddings().weight)


def test_shards_make_no_difference(shards, llama):
    assert len(list(shards.glob("*.safetensors"))) > 2
    one, many = open_checkpoint(llama), open_checkpoint(shards)
    assert one.specs == many.specs and one.fingerprint == many.fingerprint and same_weights(one, many)
    assert all(torch.equal(one.read(name), many.read(name)) for name in one.tensors)


def test_links_into_a_cache_are_followed(folder, tmp_path):
    blob = (folder / SINGLE).rename(tmp_path / "blob")
    (folder / SINGLE).symlink_to(blob)
    assert open_checkpoint(folder).tensors


def test_fingerprints_tell_models_apart(llama, tmp_path):
    base, other = open_checkpoint(llama), open_checkpoint(fine_tuned(llama, tmp_path / "other", seed=1))
    half = open_checkpoint(save_model(make_model(dtype="bfloat16"), tmp_path / "half"))
    assert len({base.fingerprint, other.fingerprint, half.fingerprint}) == 3
    assert not same_weights(base, other) and half.dtypes == {"bfloat16"}


def test_models_on_the_hub_are_compared_by_a_look(llama, tmp_path):
    def remote(folder):
        data = (folder / SINGLE).read_bytes()
        start = data[: 8 + int.from_bytes(data[:8], "little")]
        files = {SINGLE: RemoteFile(start, len(data), "hash", lambda begin, count: data[begin : begin + count])}
        bare = shutil.copytree(folder, tmp_path / f"{folder.name}-remote", ignore=shutil.ignore_patterns("*.safetensors"))
        return open_checkpoint(bare, files)

    base, other = open_checkpoint(llama), fine_tuned(llama, tmp_path / "other", seed=1)
    assert base.fingerprint != remote(llama).fingerprint
    shutil.rmtree(tmp_path / "llama-remote")
    assert same_weights(base, remote(llama)) and not same_weights(base, remote(other))


class TestATiedHead:
    """The head of these models is the embedding; some files hold it twice."""

    @pytest.fixture
    def tied(self, bases, tmp_path):
        return shutil.copytree(bases("llama-tied"), tmp_path / "tied")

    def test_is_listed_once(self, tied):
        embedding = load_tensors(tied)["model.embed_tokens.weight"]
        write(tied, lm_head__weight=embedding.clone())
        assert "lm_head.weight" not in open_checkpoint(tied).tensors

    @pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "neox"])
    @pytest.mark.parametrize("tie", [True, False, None])
    def test_is_what_transformers_takes_for_one(self, tmp_path, family, tie):
        """Equal bytes alone tie nothing: where the config is silent, the default of its class counts."""
        folder = save_model(make_model(family, tie_word_embeddings=True), tmp_path / "model")
        edit_json(folder / "config.json", tie_word_embeddings=None)
        if tie is not None:
            edit_json(folder / "config.json", tie_word_embeddings=tie)
        head = "embed_out.weight" if family == "neox" else "lm_head.weight"
        embedding = open_checkpoint(folder).embedding
        tensors = load_tensors(folder)
        write(folder, **{head.replace(".", "__"): tensors[embedding].clone()})
        loaded = load_model(folder)
        is_one = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
        found = open_checkpoint(folder)
        assert found.is_tied is is_one
        assert (head in found.tensors) is not is_one
        if tie is not None:
            assert is_one is tie

    def test_that_differs_is_refused_if_the_config_ties_it(self, tied):
        write(tied, lm_head__weight=load_tensors(tied)["model.embed_tokens.weight"] + 1)
        what = "the config ties head and embedding, yet 'lm_head.weight' differs from 'model.embed_tokens.weight'"
        refusal(tied, what, "set tie_word_embeddings to false in config.json if the head was trained apart")

    def test_is_its_own_if_the_config_says_so(self, tied):
        embedding = load_tensors(tied)["model.embed_tokens.weight"]
        write(tied, lm_head__weight=embedding.clone())
        edit_json(tied / "config.json", tie_word_embeddings=False)
        assert open_checkpoint(tied).token_tensors == ("model.embed_tokens.weight", "lm_head.weight")
        write(tied, lm_head__weight=embedding + 1)
        assert open_checkpoint(tied).token_tensors == ("model.embed_tokens.weight", "lm_head.weight")


def test_tables_that_transformers_computes_are_no_parameters(folder):
    before = open_checkpoint(folder)
    fingerprint = before.fingerprint
    tables = {f"model.layers.{block}.self_attn.rotary_emb.inv_freq": torch.ones(4) for block in range(2)}
    tables |= {"h.0.attn.bias": torch.ones(1, 1, 128, 128), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    tables |= {"h.1.attn.bias": torch.ones(1, 1, 128, 128, dtype=torch.bool)}
    save_file(load_tensors(folder) | tables, folder / SINGLE)
    after = open_checkpoint(folder)
    assert after.specs == before.specs and after.fingerprint == fingerprint


def test_names_that_differ_by_leading_words(bases, tmp_path):
    long = open_checkpoint(bases("gpt2"))
    bare = shutil.copytree(bases("gpt2"), tmp_path / "bare")
    save_file({name.removeprefix("transformer."): t for name, t in load_tensors(bare).items()}, bare / SINGLE)
    short = open_checkpoint(bare)
    assert short.layers.prefix == "h" and short.embedding == "wte.weight"
    for one, other in ((short, long), (long, short)):
        renamed = named_like(one, other)
        assert renamed.specs == other.specs and renamed.layers == other.layers and renamed.fingerprint == other.fingerprint
        assert renamed.embedding == other.embedding and renamed.token_tensors == other.token_tensors
    assert named_like(long, long) is long and named_like(long, open_checkpoint(bases("llama"))) is long


def test_a_folder_without_a_model(tmp_path):
    error = refusal(tmp_path, "there is no config.json", "give the folder of a Hugging Face model or adapter")
    assert "there are no weights in this folder" in error and f"fix: give a folder that holds {SINGLE}, or {INDEX} and its shards" in error
    refusal(tmp_path / "nowhere", "there is no config.json", "give the folder")
    (tmp_path / "adapter_model.safetensors").touch()
    refusal(tmp_path, "there is no adapter_config.json beside the adapter's weights", "copy the whole folder of the adapter")


@pytest.mark.parametrize("text", ["", "{", "[1]", '"a"', "\x00", "[" * 100_000])
def test_a_damaged_config(folder, text):
    (folder / "config.json").write_text(text)
    refusal(folder, "config.json ", "the file is damaged: copy or download it again", where="config.json")


def test_bytes_that_are_no_text(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match=r"config.json cannot be read: 'utf-8' codec can't decode"):
        read_json(folder / "config.json")


def test_damaged_weights(folder):
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[:-1])
    refusal(folder, f"the header describes {len(data)} bytes, the file has {len(data) - 1}", "copy or download it again", where=SINGLE)
    (folder / SINGLE).write_bytes(b"")
    refusal(folder, "a safetensors file has at least 8 bytes, this one has 0", "copy or download it again", where=SINGLE)
    (folder / SINGLE).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refusal(folder, "the header claims", "copy or download it again", where=SINGLE)
    (folder / SINGLE).unlink()
    refusal(folder, "there are no weights in this folder", f"a folder that holds {SINGLE}, or {INDEX} and its shards")


def test_pickled_weights(folder):
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    for name in ("optimizer.pt", "training_args.bin", "scheduler.pt", "rng_state.pth"):
        (folder / name).touch()
    error = refusal(folder, "the weights are pickled (pytorch_model.bin); loading a pickle runs code", "convert them where you trust them")
    assert "AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)" in error
    (folder / "pytorch_model.bin").rename(folder / "model.Q4_K_M.gguf")
    refusal(folder, "the weights are not safetensors (model.Q4_K_M.gguf)", f"a folder that holds {SINGLE}")


def test_faults_of_config_and_weights_are_told_at_once(folder):
    (folder / "config.json").write_text("{")
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    assert "the weights are pickled" in refusal(folder, "config.json cannot be read", "damaged", where="config.json")


def test_two_models_in_one_folder(shards):
    shutil.copy(next(shards.glob("*.safetensors")), shards / SINGLE)
    refusal(shards, f"the folder holds two models, {SINGLE} and {INDEX}", "delete the one that is out of date")


class TestAnIndex:
    @pytest.fixture
    def edit(self, shards):
        """Change what the index says of one tensor."""

        def change(file, tensor="model.norm.weight"):
            index = json.loads((shards / INDEX).read_text())
            index["weight_map"][tensor] = file
            (shards / INDEX).write_text(json.dumps(index))

        return change

    @pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
    def test_that_is_damaged(self, shards, content):
        (shards / INDEX).write_text(content)
        refusal(shards, "the index has no weight_map", "the file is damaged: copy or download it again", where=INDEX)

    def test_that_names_a_missing_file(self, shards, edit):
        edit("model-00009-of-00009.safetensors")
        refusal(shards, "the index names 'model-00009-of-00009.safetensors', which is missing", "copy or download the missing file")

    @pytest.mark.parametrize(
        "file",
        [
            "../m.safetensors",
            "/etc/m.safetensors",
            "sub/m.safetensors",
            "..\\m.safetensors",
            "..",
            "",
            "pytorch_model.bin",
            "m\0.safetensors",
        ],
    )
    def test_that_names_a_file_outside_its_folder_or_of_another_kind(self, shards, edit, file):
        edit(file)
        (shards / "sub").mkdir()
        (shards / "sub" / "m.safetensors").touch()
        (shards / "pytorch_model.bin").touch()
        what = f"the index names {file!r}, which is outside its folder or not safetensors"
        refusal(shards, what, "do not use this model", where=INDEX)

    def test_that_promises_what_no_shard_holds(self, shards, edit):
        file = sorted(shards.glob("*.safetensors"))[0].name
        edit(file, "model.layers.0.nothing.weight")
        what = f"the index promises tensor 'model.layers.0.nothing.weight', which '{file}' does not hold"
        refusal(shards, what, "copy or download it again", where=INDEX)

    def test_that_leaves_a_tensor_out_or_in_the_wrong_place(self, shards, edit):
        first, last = (sorted(shards.glob("*.safetensors"))[place].name for place in (0, -1))
        index = json.loads((shards / INDEX).read_text())
        held = index["weight_map"]["model.norm.weight"]
        edit(last if held == first else first)
        refusal(shards, f"'{held}' holds tensor 'model.norm.weight', which the index does not list there", "again", where=INDEX)
        del index["weight_map"]["model.norm.weight"]
        (shards / INDEX).write_text(json.dumps(index))
        refusal(shards, f"'{held}' holds tensor 'model.norm.weight', which the index does not list there", "again", where=INDEX)

    def test_whose_shards_hold_a_tensor_twice(self, shards):
        first, *_, last = sorted(shards.glob("*.safetensors"))
        tensors = load_tensors(shards)
        twice = json.loads((shards / INDEX).read_text())["weight_map"]
        name = next(name for name, file in twice.items() if file == first.name)
        own = {name: tensors[name] for name, file in twice.items() if file == last.name}
        save_file(own | {name: tensors[name]}, last)
        refusal(shards, f"'{last.name}' holds tensor '{name}', which the index does not list there", "again", where=INDEX)


def test_an_adapter_in_a_subfolder_is_pointed_to(folder, tmp_path):
    (tmp_path / "many" / "one").mkdir(parents=True)
    (tmp_path / "many" / "one" / "adapter_config.json").write_text("{}")
    fix = f"give the folder of the adapter itself: {tmp_path / 'many' / 'one'}"
    refusal(tmp_path / "many", "this folder is no model; its subfolder 'one' is an adapter", fix)


def test_shards_without_an_index(folder):
    (folder / SINGLE).rename(folder / "model-00001-of-00002.safetensors")
    refusal(folder, "there are shards (model-00001-of-00002.safetensors, ...) but no index of them", f"copy {INDEX} too")


def test_weights_that_were_not_gathered(folder):
    save_file({name: torch.zeros(0) for name in load_tensors(folder)}, folder / SINGLE, metadata={"format": "pt"})
    refusal(folder, "the model's 'lm_head.weight' is empty", "stage3_gather_16bit_weights_on_model_save")


def test_quantised_weights(folder):
    edit_json(folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    refusal(folder, "the weights are quantised", "dequantise the model first, and merge that", where="config.json")


@pytest.mark.parametrize(
    ("dtype", "code"), [(torch.int8, "I8"), (torch.uint8, "U8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.int32, "I32")]
)
def test_weights_that_are_no_floating_point_numbers(folder, dtype, code):
    name = "model.layers.0.mlp.up_proj.weight"
    write(folder, **{name: load_tensors(folder)[name].to(dtype)})
    refusal(folder, f"tensor '{name}' is of dtype {code}", "merge a model in F32, F16 or BF16", where=SINGLE)
    write(folder, **{"model.layers.1.mlp.up_proj.weight": load_tensors(folder)[name]})
    refusal(folder, f"is of dtype {code} (and 1 more)", "merge a model in F32, F16 or BF16", where=SINGLE)


PACKED = {  # as gpt-oss, AutoGPTQ, compressed-tensors and HQQ store weights in blocks of few bits
    "mlp.experts.gate_up_proj_blocks": torch.zeros(4, 16, 2, 16, dtype=torch.uint8),
    "mlp.experts.gate_up_proj_scales": torch.zeros(4, 16, 2, dtype=torch.uint8),
    "mlp.up_proj.qzeros": torch.zeros(1, 8, dtype=torch.int32),
    "mlp.up_proj.weight_packed": torch.zeros(64, 4, dtype=torch.int32),
    "mlp.up_proj.W_q": torch.zeros(32, 32, dtype=torch.uint8),
}


@pytest.mark.parametrize("name", PACKED)
def test_blocks_of_few_bits_are_known_without_a_quantization_config(folder, name):
    write(folder, **{f"model.layers.0.{name}": PACKED[name]})
    refusal(folder, f"tensor 'model.layers.0.{name}' is of dtype", "merge a model in F32, F16 or BF16", where=SINGLE)


def test_whole_numbers_that_are_no_weights_may_stay(folder):
    write(folder, model__position_ids=torch.arange(10_000), model__mask=torch.ones(100, 100, dtype=torch.bool))
    checkpoint = open_checkpoint(folder)
    assert torch.equal(checkpoint.read("model.position_ids"), torch.arange(10_000)) and checkpoint.dtypes == {"float32"}


def test_a_config_of_another_model(folder):
    edit_json(folder / "config.json", num_hidden_layers=3)
    what = "the config says 3 blocks; numbered lists among the tensor names: model.layers (2)"
    refusal(folder, what, "recall merges decoder-only models with one list of blocks")
    edit_json(folder / "config.json", num_hidden_layers=None)
    refusal(folder, "the config does not say how many blocks there are", "add num_hidden_layers", where="config.json")
    edit_json(folder / "config.json", num_hidden_layers=2, vocab_size=100)
    what = "the config says vocab_size 100; no tensor before the blocks has that many rows"
    refusal(folder, what, "of the same model")
    edit_json(folder / "config.json", vocab_size=96)
    write(folder, model__embed_more__weight=torch.zeros(96, 8))
    refusal(folder, "the config says vocab_size 96; more than one tensor before the blocks has that many rows", "of the same model")


@pytest.mark.parametrize("part", ["", 3, [1], {}])
def test_a_text_config_that_is_none(folder, part):
    config = json.loads((folder / "config.json").read_text())
    del config["num_hidden_layers"], config["vocab_size"]
    (folder / "config.json").write_text(json.dumps(config | {"text_config": part}))
    refusal(folder, "the config does not say how many blocks there are", "add num_hidden_layers", where="config.json")


def test_a_config_whose_text_part_tells(folder):
    config = json.loads((folder / "config.json").read_text())
    text = {key: config.pop(key) for key in ("num_hidden_layers", "vocab_size", "tie_word_embeddings")}
    (folder / "config.json").write_text(json.dumps(config | {"text_config": text}))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.vocabulary_size == 96 and checkpoint.layers.blocks == 2
