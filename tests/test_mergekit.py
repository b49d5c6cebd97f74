"""Run files of mergekit: what is read gives what mergekit 0.1.5 itself makes of them; what is not is refused by name."""

import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from recall_merge import MergeRun, RecallError, merge
from recall_merge.cli.app import app
from recall_merge.interop.export import export_mergekit
from recall_merge.interop.mergekit_file import PARAMETERS, MergekitFile, check_file, slices_of, values_of
from recall_merge.interop.mergekit_run import load_any_run
from recall_merge.maths.layers import Layers
from tiny import fine_tuned, load_tensors, lora, make_model, save_model

PYTHON = Path(__file__).parents[1] / ".venv-mergekit" / "bin" / "python"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base of five blocks and three experts, in float32 and bfloat16; an adapter."""
    folder = tmp_path_factory.mktemp("mergekit")
    for dtype in ("float32", "bfloat16"):
        base = save_model(make_model("llama", dtype=dtype, num_hidden_layers=5), folder / dtype / "base")
        common = fine_tuned(base, folder / dtype / "common", seed=9, scale=0.05)  # experts' deltas point alike, as real ones do
        for seed, name in enumerate("abc", 1):
            fine_tuned(common, folder / dtype / name, seed=seed, scale=0.05)
    lora(folder / "float32" / "base", folder / "float32" / "lora", seed=4, r=2, target_modules=["q_proj", "down_proj"])
    return folder


def written(folder, text):
    path = folder / "mergekit.yml"
    path.write_text(text, "utf-8")
    return path


def ours(path, out):
    return merge(load_any_run(path, {"out.path": str(out), "out.reload": False}))


TIES = """
models:
  - model: base
  - model: a
    parameters: {density: [1, 0.7, 0.1], weight: 1.0}
  - model: b
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]
  - model: c
    parameters:
      density: 0.33
      weight: [{filter: mlp, value: 0.5}, {value: 0.2}]
merge_method: ties
base_model: base
parameters: {normalize: true, int8_mask: true}
"""
SLERP = """
slices:
  - sources:
      - {model: a, layer_range: [0, 5]}
      - {model: b, layer_range: [0, 5]}
merge_method: slerp
base_model: a
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
"""
SLICES = """
slices:
  - sources:
      - {model: base, layer_range: [0, 2]}
      - {model: a, layer_range: [0, 2], parameters: {weight: [0.2, 0.8]}}
      - {model: b, layer_range: [0, 2], parameters: {weight: 0.5}}
    parameters: {lambda: 0.5}
  - sources:
      - {model: base, layer_range: [2, 3]}
      - {model: a, layer_range: [2, 3], parameters: {weight: [0.1, 0.9]}}
      - {model: b, layer_range: [2, 3]}
  - sources:
      - {model: base, layer_range: [3, 5]}
      - {model: a, layer_range: [3, 5], parameters: {weight: 0.6}}
      - {model: b, layer_range: [3, 5], parameters: {weight: [{filter: down_proj, value: [0, 1]}]}}
merge_method: task_arithmetic
base_model: base
parameters: {weight: "3e-1"}
"""
EACH = "models: [{model: a, parameters: {weight: 0.7}}, {model: b, parameters: {weight: [0.2, 0.5]}}]\nbase_model: base\n"
FILES = {
    "ties": TIES,
    "slerp": SLERP,
    "slices": SLICES,
    "linear": "models: [{model: a, parameters: {weight: [1, 0, 2]}}, {model: b, parameters: {weight: 0.5}}, {model: c, parameters: "
    "{weight: [{filter: q_proj, value: 3}, {value: 1}]}}]\nmerge_method: linear\n",
    "linear with a base": "models: [{model: a}, {model: b, parameters: {weight: 2}}]\nmerge_method: linear\nbase_model: base\n"
    "parameters: {weight: 1}\n",
    "task arithmetic": EACH + "merge_method: task_arithmetic\nparameters: {lambda: [0.5, 1.5]}\n",
    "task arithmetic, normalized": EACH + "merge_method: task_arithmetic\nparameters: {normalize: true}\n",
    "ties, not normalized": EACH + "merge_method: ties\nparameters: {normalize: false, density: 0.4, lambda: 0.7}\n",
    "breadcrumbs": EACH + "merge_method: breadcrumbs\nparameters: {density: 0.8, gamma: [0.01, 0.1]}\n",
    "breadcrumbs_ties": EACH + "merge_method: breadcrumbs_ties\nparameters: {density: 0.8, rescale: true}\n",
    "dare_linear": EACH + "merge_method: dare_linear\n",
    "dare_ties": EACH + "merge_method: dare_ties\nparameters: {normalize: true}\n",
    "della": EACH + "merge_method: della\nparameters: {density: 1, epsilon: 0}\n",
    "della_linear": EACH + "merge_method: della_linear\nparameters: {density: 1, epsilon: 0, lambda: 0.6}\n",
    "nuslerp": EACH + "merge_method: nuslerp\n",
    "nuslerp, rows": EACH + "merge_method: nuslerp\nparameters: {nuslerp_flatten: false}\n",
    "nuslerp, no base": EACH.replace("base_model: base\n", "") + "merge_method: nuslerp\n",
    "karcher": "models: [{model: a}, {model: b}, {model: c}]\nmerge_method: karcher\n",
    "model_stock": "models: [{model: a}, {model: b}, {model: c}]\nmerge_method: model_stock\nbase_model: base\n",
    "sce": "models: [{model: a}, {model: b}, {model: c}]\nmerge_method: sce\nbase_model: base\nparameters: {select_topk: [0.3, 0.9]}\n",
    "an adapter": "models: [{model: base+lora, parameters: {weight: 0.5}}, {model: a, parameters: {weight: 0.5}}]\n"
    "merge_method: task_arithmetic\nbase_model: base\ntokenizer_source: base\n",
}


RUN_ALL = """
import sys, yaml
from pathlib import Path
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

for file in map(Path, sys.argv[1:]):
    config = MergeConfiguration.model_validate(yaml.safe_load(file.read_text()))
    given = {"lora_merge_cache": str(file.parent / "cache"), "lora_merge_dtype": "float32", "write_model_card": False, "quiet": True}
    run_merge(config, str(file.with_suffix("")), MergeOptions(**given))
"""


def out_of(dtype):
    return "dtype: float32\nout_dtype: bfloat16\n" if dtype == "bfloat16" else "dtype: float32\n"


@pytest.fixture(scope="module")
def theirs(world, tmp_path_factory):
    """What mergekit makes of all files, one process a dtype: a folder with theirs of each."""
    if not PYTHON.exists():
        pytest.skip("mergekit is not there: scripts/mergekit_venv.sh")
    folder = tmp_path_factory.mktemp("theirs")
    for dtype in ("float32", "bfloat16"):
        files = []
        for number, (case, text) in enumerate(FILES.items()):
            if (case, dtype) not in CASES:
                continue
            files.append(folder / f"{dtype}-{number}.yml")
            files[-1].write_text(text + out_of(dtype))
        ran = subprocess.run([PYTHON, "-c", RUN_ALL, *files], capture_output=True, text=True, check=False, cwd=world / dtype)
        assert ran.returncode == 0, ran.stderr
    return folder


SELECT = ("ties", "breadcrumbs", "della", "sce")  # entries of equal size, which bfloat16 has many of, stay or go together here alone
CASES = [(case, dtype) for case in FILES for dtype in ("float32", "bfloat16") if (case, dtype) != ("an adapter", "bfloat16")]


@pytest.mark.slow
@pytest.mark.mergekit
@pytest.mark.parametrize(("case", "dtype"), CASES)
def test_mergekit_makes_the_same_of_its_file(case, dtype, theirs, world, tmp_path, monkeypatch):
    monkeypatch.chdir(world / dtype)
    ours(written(tmp_path, FILES[case] + out_of(dtype)), tmp_path / "ours")
    found, wanted = load_tensors(tmp_path / "ours"), load_tensors(theirs / f"{dtype}-{list(FILES).index(case)}")
    assert found.keys() == wanted.keys()
    assert all(found[name].dtype == tensor.dtype for name, tensor in wanted.items())
    one, two = (torch.cat([tensors[name].float().flatten() for name in wanted]) for tensors in (found, wanted))
    if dtype == "float32":
        torch.testing.assert_close(one, two, rtol=1e-5, atol=5e-6)
    else:  # at most one step of bfloat16, and that rarely
        apart = (one - two).abs() > 2**-7 * two.abs() + 1e-5
        assert float(apart.float().mean()) <= (0.01 if any(word in case for word in SELECT) else 0)
        assert float((one != two).float().mean()) < 0.03


@pytest.mark.parametrize("case", FILES)
def test_every_file_is_read(case, world, tmp_path, monkeypatch):
    monkeypatch.chdir(world / "float32")
    run = load_any_run(written(tmp_path, FILES[case]))
    assert isinstance(run, MergeRun)
    assert run.method == yaml.safe_load(FILES[case])["merge_method"]


def test_every_method_that_is_read_is_compared():
    assert {yaml.safe_load(text)["merge_method"] for text in FILES.values()} == set(PARAMETERS)


def test_gradients_filters_and_precedence_by_hand():
    data = {
        "merge_method": "ties",
        "base_model": "z",
        "models": [
            {"model": "a", "parameters": {"weight": [0, 1, 3], "density": [{"filter": "mlp", "value": [1, 0.5]}]}},
            {"model": "b"},
        ],
        "parameters": {"weight": 0.25, "density": 0.75, "normalize": [False, True]},
    }
    file, layers = MergekitFile.model_validate(data), Layers("model.layers", 5)
    check_file(file)
    slices = slices_of(file, 5)
    found = [values_of(file, slices, f"model.layers.{i}.mlp.up_proj.weight", layers) for i in range(5)]
    assert [one.by_model["a"]["weight"] for one in found] == [0, 0.5, 1, 2, 3]
    assert [one.by_model["a"]["density"] for one in found] == [1, 0.875, 0.75, 0.625, 0.5]
    assert [one.shared["normalize"] for one in found] == [False] * 4 + [True]
    other = values_of(file, slices, "model.layers.4.self_attn.q_proj.weight", layers)
    assert other.by_model["a"]["density"] == 0.75
    assert other.by_model["b"]["weight"] == 0.25
    assert other.by_model["z"] == {}
    assert values_of(file, slices, "lm_head.weight", layers).by_model["a"]["weight"] == 0


def test_an_exported_run_gives_the_same_merge(world, tmp_path, monkeypatch):
    places = world / "float32"
    experts = [{"name": n, "path": str(places / n), "same_base": True} for n in ("a", "lora", "b")]
    rows = {"a": [1, 1, 2, 0, 1, 1, 3], "lora": [0, 1, 1, 1, 1, 1, 1], "b": [1, 2, 1, 1, 1, 5, 1]}
    run = {"base": str(places / "base"), "experts": experts, "method": "linear", "options": {"scale": 0.8}, "weights": {"by_layer": rows}}
    first = merge(MergeRun.model_validate(run | {"skip": ["*.0.*o_proj*"], "out": {"path": tmp_path / "first"}}))
    made = export_mergekit(first.path, models={n: str(places / n) for n in ("base", "a", "lora", "b")})
    ours(made.path, tmp_path / "again")
    one, two = load_tensors(first.path), load_tensors(tmp_path / "again")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-6, atol=1e-7)


def test_on_the_command_line(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world / "float32")
    path = written(tmp_path, TIES)
    ran = CliRunner().invoke(app, ["plan", str(path), "--out", str(tmp_path / "out"), "--json"])
    assert ran.exit_code == 0, ran.output
    ran = CliRunner().invoke(app, ["merge", str(path), "--out", str(tmp_path / "out"), "--set", "out.dtype=bfloat16"])
    assert ran.exit_code == 0, ran.output
    assert {tensor.dtype for tensor in load_tensors(tmp_path / "out").values()} == {torch.bfloat16}


def test_a_path_beside_the_file(world, tmp_path):
    path = written(world / "float32", TIES)
    assert load_any_run(path).base == str(world / "float32" / "base")


START = "merge_method: ties\nbase_model: base\n"
MODELS = START + "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]\n"


def two_slices(first, second, **more):
    def one(span, names):
        return {"sources": [{"model": name, "layer_range": span, "parameters": {"weight": 1}} for name in names]} | more

    return START + yaml.safe_dump({"slices": [one(first, ["base", "a"]), one(second, ["base", "a"])]})


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (MODELS.replace("ties", "passthrough"), "mergekit's merge_method 'passthrough' is not supported"),
        (MODELS.replace("ties", "nearswap"), "nearswap"),
        (START, "either `models` or `slices` is needed"),
        (START + "modules: {text: {}}\n", "`modules` is not supported"),
        (MODELS + "tokenizer: {source: base, tokens: {x: {source: a}}}\n", "`tokenizer.tokens` is not supported"),
        (MODELS + "tokenizer: {source: base, pad_to_multiple_of: 8}\n", "`tokenizer.pad_to_multiple_of` is not supported"),
        (MODELS + "tokenizer: {source: base}\ntokenizer_source: base\n", "exclude each other"),
        (MODELS + "tokenizer_source: a\n", "the tokenizer of 'a' cannot be used"),
        (MODELS + "chat_template: chatml\n", "`chat_template` is not supported"),
        (MODELS + "dtype: float64\n", "`dtype: float64` is not supported"),
        (MODELS + "parameters: {wieght: 1}\n", r"no supported parameter 'wieght'(.|\n)*did you mean 'weight'"),
        (MODELS + "method: ties\n", "unknown key 'method'"),
        (MODELS + "parameters: {density: much}\n", "'much' is not a number"),
        (MODELS + "parameters: {normalize: 3}\n", "3 is neither true nor false"),
        (MODELS.replace("weight: 1}}]", "weight: -1}}]"), "a weight is negative: -1"),
        (MODELS.replace("{weight: 1}}]", "{density: 1}}]"), "'weight' is missing for weight of b"),
        (MODELS.replace("base_model: base\n", ""), "`ties` needs a base model"),
        (MODELS.replace("base_model: base", "base_model: base+lora"), "the base is an adapter"),
        (MODELS.replace("{model: b", "{model: a"), "a model is listed twice"),
        (MODELS.replace("{model: b", "{model: c+lora"), "an adapter on another model"),
        (MODELS.replace("ties", "linear") + "parameters: {normalize: false, weight: 0}\n", "the weights sum to 2"),
        (MODELS.replace("ties", "slerp").replace("weight: 1", ""), "'t' is missing"),
        (MODELS.replace("ties", "slerp").replace("weight: 1", "") + "parameters: {t: 0.5}\n", "there are 3 models"),
        (MODELS.replace("ties", "karcher").replace("weight: 1", "max_iter: 3"), "iterated until it no longer moves"),
        (two_slices([0, 3], [2, 5]), "slice 2 to 5 does not continue at layer 3"),
        (two_slices([2, 5], [0, 2]), "slice 2 to 5 does not continue at layer 0"),
        (two_slices([0, 2], [2, 4]), "the slices end at layer 4; the base has 5"),
        (two_slices([0, 2], [2, 5], residual_weight=0.1), "`residual_weight` is not supported"),
        (two_slices([0, 2], [2, 5], base_model="b"), "a slice with its own base model"),
        (two_slices([0, 2], [2, 5]).replace("base_model: base", "base_model: b"), "the base model is not among the slices' sources"),
    ],
)
def test_what_is_refused(text, what, world, tmp_path, monkeypatch):
    monkeypatch.chdir(world / "float32")
    with pytest.raises(RecallError, match=what):
        load_any_run(written(tmp_path, text))


def test_slices_of_different_layers_or_models(world, tmp_path, monkeypatch):
    monkeypatch.chdir(world / "float32")
    data = yaml.safe_load(two_slices([0, 2], [2, 5]))
    data["slices"][1]["sources"][1]["layer_range"] = [1, 4]
    with pytest.raises(RecallError, match="the sources of a slice have different layers"):
        load_any_run(written(tmp_path, yaml.safe_dump(data)))
    data["slices"][1]["sources"][1] |= {"layer_range": [2, 5], "model": "c"}
    with pytest.raises(RecallError, match="slices with different models are not supported"):
        load_any_run(written(tmp_path, yaml.safe_dump(data)))
