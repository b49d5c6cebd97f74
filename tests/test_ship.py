"""What docs/ship.md promises: other tools answer from a result's folder as it is, and an adapter answers as the folder does."""

import json
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from recall_merge import MergeRun, merge
from recall_merge.demo.smollm import _write_tokenizer, find_gguf
from recall_merge.interop.export import export_adapter
from tiny import edit_json, fine_tuned, load_model, lora, make_model, quiet, save_model

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "ship.md").read_text("utf-8")
RUNTIMES = ROOT / ".venv-runtimes"
CHAT = [{"role": "user", "content": "Is the fox quick?"}]
TEXTS = ["the quick brown fox", " Is it good?\n\n  0123 (yes)", "THE END"]
MAPS = {"sentiment": ["q_proj", "down_proj"], "french": ["q_proj", "v_proj"]}


def merged(folder, experts, **out):
    entries = [{"name": name, "path": str(path)} for name, path in experts.items()]
    run = {"base": str(folder / "base"), "experts": entries, "method": "linear", "out": {"path": folder / "merged"} | out}
    return merge(MergeRun.model_validate(run)).path


def of_adapters(folder, **settings):
    """A base, two LoRA adapters on it, their merge, and that as an adapter of rank 8, where the page has it."""
    experts = {
        name: lora(folder / "base", folder / name, seed=len(name), r=4, scale=0.3, target_modules=maps) for name, maps in MAPS.items()
    }
    result = merged(folder, experts, **settings)
    export_adapter(result, models={"base": str(folder / "base")}, rank=8, out=folder / "served" / "merged")
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(make_model("llama"), tmp_path / "base", template=True)
    return of_adapters(tmp_path)


def answer(folder, tokens=64):
    """What the first block of the page prints, computed here; and the number of tokens of the prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    start = prompt["input_ids"].shape[1]
    said = load_model(folder, dtype="float32").generate(**prompt, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(said[0, start:], skip_special_tokens=True)


def shown(start):
    """The one command of the page that begins so."""
    [line] = re.findall(rf"^\$ ({re.escape(start)}.*)$", PAGE, re.MULTILINE)
    return shlex.split(line)


def test_the_python_of_the_page_runs(here):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 2
    run = subprocess.run([sys.executable, "-c", "".join(blocks)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip("\n") == answer(here / "merged").strip("\n") != ""


def test_the_adapter_gives_the_logits_of_the_folder(here):
    """q_proj needs rank 8, the sum of the experts' ranks; rank 4 is too little for it, and the export says so."""
    tokens = torch.arange(3, 83)[None]
    with quiet(), torch.no_grad():
        wanted, base = (load_model(here / name)(tokens).logits for name in ("merged", "base"))
        found = AutoPeftModelForCausalLM.from_pretrained("served/merged").eval()(tokens).logits
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert (wanted - base).abs().max() > 0.01
        made = export_adapter(here / "merged", models={"base": str(here / "base")}, rank=4, out=here / "small")
        assert made.error > 0.1
        small = AutoPeftModelForCausalLM.from_pretrained(made.path).eval()(tokens).logits
        assert (small - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("speaker", ["base", "french"])
def test_it_reads_and_answers_as_its_base(tmp_path, speaker):
    """Or as the expert that `out.chat_template` names: rendering, tokens, and what generation does by default."""
    base = save_model(make_model("llama"), tmp_path / "base", template=True)
    edit_json(base / "generation_config.json", do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=1.1)
    french = fine_tuned(base, tmp_path / "french", seed=1)
    tokenizer = AutoTokenizer.from_pretrained(french)
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['content'] }} =></s>{% endfor %}"
    tokenizer.save_pretrained(french)
    result = merged(tmp_path, {"sentiment": fine_tuned(base, tmp_path / "sentiment", seed=2), "french": french}, chat_template=speaker)
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (result, tmp_path / speaker))
    rendered = [one.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False) for one in (ours, theirs)]
    assert rendered[0] == rendered[1]
    assert ("=>" in rendered[0]) == (speaker == "french")
    assert ours(TEXTS)["input_ids"] == theirs(TEXTS)["input_ids"]
    assert ours.special_tokens_map == theirs.special_tokens_map
    defaults = [GenerationConfig.from_pretrained(folder).to_diff_dict() for folder in (result, base)]
    assert defaults[0] == defaults[1]
    assert defaults[0]["temperature"] == 0.6


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "gemma2", "mixtral"])
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_the_folder_has_what_vllm_reads(tmp_path, family, shard_size):
    """Of vLLM 0.33.0: transformers_utils/config.py, model_executor/model_loader/default_loader.py, weight_utils.py, renderers/hf.py."""
    base = save_model(make_model(family), tmp_path / "base", template=True)
    result = merged(tmp_path, {"a": fine_tuned(base, tmp_path / "a", seed=1)}, shard_size=shard_size)
    config = json.loads((result / "config.json").read_text())
    assert config["architectures"] == [type(load_model(base)).__name__]  # by this name vLLM finds its own class
    assert "quantization_config" not in config
    assert AutoConfig.from_pretrained(result).to_dict() == AutoConfig.from_pretrained(base).to_dict() | {"_name_or_path": str(result)}
    # it takes every *.safetensors if there is no index, and those of the index if there is one; other weights come first or last
    weights = {file.name for file in result.iterdir() if file.suffix in {".safetensors", ".bin", ".pt"}}
    assert not any(name.startswith("consolidated") for name in weights)
    index = result / "model.safetensors.index.json"
    assert weights == (set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"})
    assert index.exists() == (shard_size == "20KB")
    assert AutoTokenizer.from_pretrained(result).get_chat_template() == AutoTokenizer.from_pretrained(base).get_chat_template()
    assert GenerationConfig.from_pretrained(result).to_diff_dict() == GenerationConfig.from_pretrained(base).to_diff_dict()


def test_the_adapter_has_what_vllm_reads(here):
    """Of vLLM 0.33.0: lora/peft_helper.py, lora/lora_model.py, lora/utils.py. It refuses what is stored whole; the export tells of it."""
    from safetensors import safe_open

    config = json.loads(Path("served/merged/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 8
    refused = ["modules_to_save", "use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora"]
    assert not any(config[key] for key in [*refused, "rank_pattern", "alpha_pattern"])  # the last two: for llama.cpp
    assert config["bias"] == "none" and config["init_lora_weights"] is True
    with safe_open("served/merged/adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
    modules = {name.removeprefix("base_model.model.").rsplit(".", 2)[0] for name in names}
    assert modules == set(config["target_modules"]) == {name for name, _ in load_model(here / "base").named_modules() if name in modules}
    assert names == {f"base_model.model.{module}.lora_{part}.weight" for module in modules for part in "AB"}
    whole = merged(here, {"whole": fine_tuned(here / "base", here / "whole", seed=3)}, path=here / "again")
    made = export_adapter(whole, models={"base": str(here / "base")}, rank=8, out=here / "more")
    assert json.loads((made.path / "adapter_config.json").read_text())["modules_to_save"]
    assert "inference engines that take only LoRA factors do not" in made.notes[-1]


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "LLAMA"), ("llama-tied", "LLAMA"), ("qwen2", "QWEN2"), ("gemma2", "GEMMA2"), ("phi3", "PHI3")]
)
def test_the_folder_has_what_the_converter_of_llama_cpp_reads(tmp_path, family, kind):
    """By the names and the reader of the `gguf` package, which the converter uses, too; config keys as its class TextModel reads them."""
    import gguf

    base = save_model(make_model(family), tmp_path / "base", template=True)
    result = merged(tmp_path, {"a": fine_tuned(base, tmp_path / "a", seed=1)}, shard_size="20KB")
    config = AutoConfig.from_pretrained(result).to_dict()
    needed = ["architectures", "vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size", "num_hidden_layers"]
    assert all(config[key] for key in [*needed, "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_parameters"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind], config["num_hidden_layers"])
    stored = json.loads((result / "model.safetensors.index.json").read_text())["weight_map"]
    assert [name for name in stored if names.get_name(name, (".weight", ".bias")) is None] == []
    assert set(result.glob("model*.safetensors")) == {result / file for file in stored.values()}
    vocabulary = gguf.SpecialVocab(result, load_merges=True)
    assert vocabulary.chat_template == AutoTokenizer.from_pretrained(base).chat_template
    assert vocabulary.special_token_ids == {"bos": 1, "eos": 2, "pad": 0}
    assert vocabulary.merges
    # it tells the pre-tokeniser by the tokens of a text: these are the base's
    assert (result / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


# Other tools, in their own virtual environment (scripts/runtimes_venv.sh)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The same, with a tokenizer that llama.cpp knows."""
    if not RUNTIMES.exists():
        pytest.skip("the runtimes are not there: scripts/runtimes_venv.sh")
    folder = tmp_path_factory.mktemp("real")
    (folder / "tokenizer").mkdir()
    _write_tokenizer(find_gguf(), folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    model = make_model("llama", vocab_size=len(tokenizer), pad_token_id=2)
    save_model(model, folder / "base", tokenizer=tokenizer)
    return of_adapters(folder, shard_size="4MB")


def in_venv(*words, cwd):
    ran = subprocess.run([RUNTIMES / "bin" / "python", *words], cwd=cwd, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.slow
@pytest.mark.runtimes
def test_transformers_serves_it(real):
    words = shown("transformers serve")
    port = "8791"
    words[words.index("--port") + 1] = port
    asked = {"model": "merged", "messages": CHAT, "max_tokens": 20, "temperature": 0}
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/chat/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with (
        (real / "log").open("w") as log,
        subprocess.Popen(
            [RUNTIMES / "bin" / "python", "-m", "transformers.cli.transformers", *words[1:]], cwd=real, stdout=log, stderr=log
        ) as server,
    ):
        try:
            for _ in range(100):
                try:
                    urllib.request.urlopen(f"http://localhost:{port}/health").close()
                    break
                except URLError:
                    time.sleep(0.5)
            with urllib.request.urlopen(request) as reply:
                said = json.load(reply)["choices"][0]["message"]["content"]
        finally:
            server.terminate()
    assert said == answer(real / "merged", tokens=20)


SAYS = """
import json, sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup, params.cpuparams.n_threads = sys.argv[1], 128, 1, False, 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in sys.argv[3:]]
asked = {"messages": json.loads(sys.argv[2]), "max_tokens": 8, "temperature": 0}
print(json.dumps(xllamacpp.Server(params).handle_chat_completions(asked)["choices"][0]["message"]["content"]))
"""


@pytest.mark.slow
@pytest.mark.runtimes
def test_llama_cpp_answers_as_transformers_does(real):
    """Its converters' commands are the page's. float32, so that rounding does not decide between the words of random weights."""
    converters = (shown("python llama.cpp/convert_hf"), shown("python llama.cpp/convert_lora"))
    for _, script, *words in (*converters, (*converters[0][:2], "base", "--outfile", "base.gguf")):
        in_venv(RUNTIMES / script, *words, "--outtype", "f32", cwd=real)
    wanted = {name: answer(real / name, tokens=8) for name in ("merged", "base")}
    assert wanted["merged"] != wanted["base"]
    for models, name in ((["merged.gguf"], "merged"), (["base.gguf"], "base"), (["base.gguf", "adapter.gguf"], "merged")):
        said = json.loads(in_venv("-c", SAYS, models[0], json.dumps(CHAT), *models[1:], cwd=real))
        assert said == wanted[name], models
