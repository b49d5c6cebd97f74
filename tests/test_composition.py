"""What goes around a method: weights by layer, a scale by layer, pruning; and the method of a run that names none."""

import json

import pytest
import torch

from recall_merge import MergeRun, RecallError, make_plan, merge
from recall_merge.continual.settings import check_method, make_settings
from recall_merge.maths.methods import ALIASES, METHODS
from recall_merge.merging.merge import reuse
from recall_merge.merging.rules import choose_method
from recall_merge.merging.statistics import make_statistics
from recall_merge.merging.verify import verify
from tiny import fine_tuned, load_tensors, lora, make_model, save_model, write_rows

ROWS = [{"prompt": f"is the fox {word}?", "completion": " yes"} for word in ("quick", "lazy", "good", "bad")]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base of two blocks, two experts, and rows."""
    folder = tmp_path_factory.mktemp("composition")
    base = save_model(make_model("llama"), folder / "base")
    for seed, name in enumerate("abc", 1):
        fine_tuned(base, folder / name, seed=seed, scale=0.05)
    write_rows(folder / "rows.jsonl", ROWS)
    return folder


def a_run(world, out, **settings):
    experts = [{"name": name, "path": str(world / name)} for name in "ab"]
    return MergeRun.model_validate({"base": str(world / "base"), "experts": experts, "method": "linear", "out": {"path": out}} | settings)


def layer_of(name):
    return int(name.split("layers.")[1][0]) + 1 if "layers." in name else 0 if "embed" in name else 3


def check(world, out, expected):
    """Compare a result with a formula of (base, delta of a, delta of b, layer), tensor by tensor, in float64."""
    base, a, b = (load_tensors(world / name) for name in ("base", "a", "b"))
    for name, tensor in load_tensors(out).items():
        theta = base[name].double()
        wanted = expected(theta, a[name].double() - theta, b[name].double() - theta, layer_of(name))
        torch.testing.assert_close(tensor.double(), wanted, rtol=0, atol=5e-7, msg=name)


ROWS_OF_WEIGHTS = [[1, 0], [1, 3], [1, 1], [0, 2]]


@pytest.mark.parametrize("given", [ROWS_OF_WEIGHTS, {"b": [0, 3, 1, 2], "a": [1, 1, 1, 0]}], ids=["rows", "lists"])
def test_weights_by_depth(world, tmp_path, given):
    result = merge(a_run(world, tmp_path / "out", weights={"by_layer": given}))
    share = [1.0, 0.25, 0.5, 0.0]  # of a: each row over its sum
    check(world, tmp_path / "out", lambda theta, a, b, layer: theta + share[layer] * a + (1 - share[layer]) * b)
    assert result.weights.tolist() == [[part, 1 - part] for part in share]
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["weights"]["rows"] == [[part, 1 - part] for part in share]
    assert record["run"]["weights"] == {"by_layer": given}


def test_weights_of_a_record_can_be_given_back(world, tmp_path):
    samples = {"path": str(world / "rows.jsonl"), "count": 2}
    first = merge(a_run(world, tmp_path / "first", method="recall", options={"temperature": 0.1}, samples=samples))
    merge(a_run(world, tmp_path / "again", weights={"by_layer": first.record["weights"]["rows"]}))
    one, two = load_tensors(tmp_path / "first"), load_tensors(tmp_path / "again")
    assert all(torch.allclose(one[name], two[name], rtol=0, atol=1e-8) for name in one)
    assert len(set(first.weights[:, 0].tolist())) > 1


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_scale_by_depth(world, tmp_path, method):
    merge(a_run(world, tmp_path / "out", method=method, scale_by_layer={"alpha": 0.5, "beta": 1.0}))
    scale = [0.5, 0.5, 1.5, 1.5]  # alpha at block 1 of 2, alpha + beta at block 2
    each = 0.5 if method == "linear" else 1.0
    check(world, tmp_path / "out", lambda theta, a, b, layer: theta + scale[layer] * each * (a + b))
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["run"]["scale_by_layer"] == {"alpha": 0.5, "beta": 1.0}


def largest(delta, scores, count):
    """The entries of delta where |scores| is among the `count` largest."""
    kept = scores.abs().flatten().argsort(descending=True)[:count]
    return torch.zeros_like(delta).flatten().index_copy(0, kept, delta.flatten()[kept]).reshape(delta.shape)


@pytest.mark.parametrize("saliency", ["deviation", "magnitude"])
def test_pruning_comes_before_the_method(world, tmp_path, saliency):
    experts = [{"name": name, "path": str(world / name)} for name in "abc"]
    prune = {"density": 0.25, "saliency": saliency}
    merge(a_run(world, tmp_path / "out", experts=experts, weights=[1, 2, 1], prune=prune, scale_by_layer={"alpha": 2, "beta": 0}))
    base, *others = (load_tensors(world / name) for name in ("base", *"abc"))
    for name, tensor in load_tensors(tmp_path / "out").items():
        deltas = [other[name] - base[name] for other in others]
        middle = sum(deltas) / 3 if saliency == "deviation" else torch.zeros_like(deltas[0])
        kept = [largest(delta, delta - middle, int(0.25 * delta.numel())) for delta in deltas]
        wanted = base[name] + 2 * (0.25 * kept[0] + 0.5 * kept[1] + 0.25 * kept[2])
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=1e-6, msg=name)


def test_pruning_makes_factors_dense(world, tmp_path):
    base = world / "base"
    one = lora(base, tmp_path / "one", seed=1, r=2, target_modules=["q_proj"])
    experts = [{"name": "one", "path": str(one), "same_base": True}]
    merge(a_run(world, tmp_path / "out", experts=experts, method="aligned", prune={"density": 0.5, "saliency": "magnitude"}))
    before, after = load_tensors(base), load_tensors(tmp_path / "out")
    for name in before:
        share = float((before[name] != after[name]).float().mean())
        assert share == (pytest.approx(0.5, abs=0.01) if "q_proj" in name else 0)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"weights": {"by_layer": [[1, 1]] * 3}}, "there are weights for 3 layers; the base has 4, from 0 to 3"),
        ({"weights": {"by_layer": [[1, 1]] * 3 + [[1]]}}, "there are 1 weights for 2 experts at layer 3"),
        ({"weights": {"by_layer": [[1, 1]] * 3 + [[0, 0]]}}, "not all 0"),
        ({"weights": {"by_layer": []}}, "there are no weights"),
        ({"weights": {"by_layer": {"a": [1] * 4}}}, "there are lists of 4 numbers for a"),
        ({"weights": {"by_layer": {"a": [1] * 4, "b": [1] * 3}}}, "4 numbers for a, 3 numbers for b"),
        ({"weights": {"by_layer": {"a": [1] * 4, "c": [1] * 4}}}, "4 numbers for c"),
        ({"method": "recall", "weights": {"by_layer": [[1, 1]] * 4}}, "weights of its own"),
    ],
)
def test_faults(world, tmp_path, settings, what):
    samples = {"path": str(world / "rows.jsonl")} if settings.get("method") == "recall" else None
    with pytest.raises(RecallError, match=what):
        make_plan(a_run(world, tmp_path / "out", samples=samples, **settings))


@pytest.mark.parametrize(("given", "fits"), [(ROWS_OF_WEIGHTS, 2), ({"a": [1], "b": [1], "c": [2]}, 3)], ids=["rows", "lists"])
def test_settings_of_a_workspace_take_them_too(given, fits):
    settings = make_settings({}, {"method": "linear", "weights": {"by_layer": given}, "prune": {"density": 0.5}})
    check_method(settings)
    check_method(settings, fits)
    with pytest.raises(RecallError, match=r"weights|lists"):
        check_method(settings, fits + 1)


@pytest.mark.parametrize(
    "settings",
    [
        {"weights": {"by_layer": [[-1, 1]] * 4}},
        {"weights": {"by_layer": [[1, 1]] * 4, "temperature": 1}},
        {"scale_by_layer": {"alpha": 1}},
        {"scale_by_layer": {"alpha": -1, "beta": 0}},
        {"prune": {"density": 0}},
        {"prune": {"share": 0.5}},
    ],
)
def test_what_a_run_does_not_take(world, tmp_path, settings):
    with pytest.raises(ValueError, match=r"by_layer|weights|scale_by_layer|prune"):
        a_run(world, tmp_path / "out", **settings)


@pytest.mark.parametrize(
    ("statistics", "samples", "weights", "method"),
    [
        ([True, True], True, False, "aligned"),
        ([True, True], False, True, "aligned"),
        ([True, False], True, False, "tsv"),
        ([True, False], True, True, "linear"),
        ([False, False], False, False, "tsv"),
        ([False], True, False, "recall"),
        ([False], False, False, "linear"),
    ],
)
def test_the_method_that_is_chosen(statistics, samples, weights, method):
    assert choose_method(statistics, samples=samples, weights=weights)[0] == method


def test_a_run_without_a_method_says_which_it_got(world, tmp_path):
    run = a_run(world, tmp_path / "out", method=None)
    assert make_plan(run).method.name == "tsv"
    assert make_plan(run.model_copy(update={"experts": run.experts[:1]})).method.name == "linear"
    experts = []
    for name in "ab":
        stats = tmp_path / f"statistics-{name}"
        one = {"base": str(world / "base"), "experts": [{"name": name, "path": str(world / name)}]}
        make_statistics(MergeRun.model_validate(one | {"samples": {"path": str(world / "rows.jsonl")}}), folder=stats)
        experts.append({"name": name, "path": str(world / name), "stats": str(stats)})
    result = merge(a_run(world, tmp_path / "out", method=None, experts=experts))
    note = "`method` was left out: `aligned`, because every expert has input statistics"
    assert note in result.notes
    assert note in result.record["notes"]
    assert result.record["run"]["method"] == result.record["method"]["name"] == "aligned"


def test_a_ramp(world, tmp_path):
    result = merge(a_run(world, tmp_path / "out", weights={"ramp": {"a": [1, 0], "b": [1, 1]}}))
    share = [0.5, 0.5, 0.0, 0.0]  # of a: the first block's at the embedding, the last one's at norm and head
    check(world, tmp_path / "out", lambda theta, a, b, layer: theta + share[layer] * a + (1 - share[layer]) * b)
    assert result.weights[:, 0].tolist() == share


PARTS = [
    {"kind": "attention", "layers": [1], "weights": [1, 0]},
    {"filter": ["down_proj", "*.up_proj.*"], "weights": {"ramp": {"a": [0, 1], "b": [1, 1]}}, "options": {"scale": 0.5}},
    {"filter": "model.layers.*", "kind": ["attention", "mlp"], "weights": "uniform", "options": {"scale": 2.0}},
    {"kind": "norm", "weights": {"by_layer": [[1, 1], [1, 0], [0, 1], [1, 3]]}},
]


def expected_of_parts(name):
    """What each expert has of its delta, worked out by hand: (a, b)."""
    layer = layer_of(name)
    if "norm" in name:
        return {1: (1, 0), 2: (0, 1), 3: (0.25, 0.75)}[layer]
    if "attn" in name:
        return (2, 0) if layer == 1 else (1, 1)
    if "down_proj" in name or "up_proj" in name:
        return (0, 0.5) if layer == 1 else (0.25, 0.25)
    return (1, 1) if "layers" in name else (0.3, 0.7)


def test_parts(world, tmp_path):
    result = merge(a_run(world, tmp_path / "out", weights=[3, 7], parts=PARTS))
    base, a, b = (load_tensors(world / name) for name in ("base", "a", "b"))
    for name, tensor in load_tensors(tmp_path / "out").items():
        of_a, of_b = expected_of_parts(name)
        wanted = base[name] + of_a * (a[name] - base[name]) + of_b * (b[name] - base[name])
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=1e-6, msg=name)
    told = {name: part for part in result.record["parts"] for name in part["tensors"]}
    assert told["model.layers.0.self_attn.q_proj.weight"] | {"tensors": []} == {"tensors": [], "weights": [1, 0], "options": {"scale": 2.0}}
    assert told["model.norm.weight"]["weights"] == [0.25, 0.75]
    assert "lm_head.weight" not in told
    assert result.record["weights"]["rows"] == [[0.3, 0.7]] * 4
    again = merge(a_run(world, tmp_path / "again", weights=[3, 7], parts=result.record["run"]["parts"]))
    assert again.record["parts"] == result.record["parts"]
    assert verify(tmp_path / "out")["parts"] == result.record["parts"]
    assert reuse(a_run(world, tmp_path / "out", weights=[3, 7], parts=PARTS)) is not None
    assert reuse(a_run(world, tmp_path / "out", weights=[3, 7], parts=PARTS[:1])) is None


TAKE_TWO = [method.name for method in METHODS.values() if method.experts[0] <= 2 <= (method.experts[1] or 2)]


@pytest.mark.parametrize("method", [*TAKE_TWO, *ALIASES])
def test_parts_go_with_every_method(world, tmp_path, method):
    samples = {"samples": {"path": str(world / "rows.jsonl"), "count": 2}} if method in ALIASES else {}
    parts = [{"filter": "o_proj", "weights": [1, 1]}]
    merge(a_run(world, tmp_path / "one", method=method, parts=parts, **samples))
    merge(a_run(world, tmp_path / "two", method=method, **({} if method in ALIASES else {"weights": [1, 1]}), **samples))
    one, two = load_tensors(tmp_path / "one"), load_tensors(tmp_path / "two")
    differ = [name for name in one if not torch.equal(one[name], two[name])]
    assert differ == ([name for name in one if "o_proj" in name] if method in ALIASES else [])
    if method == "recall":
        merge(a_run(world, tmp_path / "three"))
        uniform, name = load_tensors(tmp_path / "three"), "model.layers.0.self_attn.o_proj.weight"
        assert torch.equal(uniform[name], one[name])


def test_an_option_of_each_expert(world, tmp_path):
    merge(a_run(world, tmp_path / "out", method="ties", options={"density": [1.0, 0.5], "mean": "none", "scale": 2.0}, weights=[1, 0]))
    check(world, tmp_path / "out", lambda theta, a, b, layer: theta + 2 * a)
    with pytest.raises(RecallError, match="'density' has 3 numbers for 2 experts"):
        make_plan(a_run(world, tmp_path / "x", method="ties", options={"density": [1, 1, 1]}))


@pytest.mark.parametrize(
    ("part", "what"),
    [
        ({"filter": "down_prj", "weights": [1, 1]}, "near it: down_proj"),
        ({"filter": "zzz", "weights": [1, 1]}, r"selects no tensor: filter zzz(.|\n)*the tensors are lm_head.weight"),
        ({"kind": "other", "weights": [1, 1]}, "the kinds of its tensors are attention, embedding, head, mlp, norm"),
        ({"kind": "mlp", "layers": [0], "weights": [1, 1]}, "the layers are 0 to 3"),
        ({"layers": [1], "weights": [1]}, r"there are 1 weights for 2 experts(.|\n)*parts.0.weights"),
        ({"layers": [1], "weights": {"by_layer": [[1, 1]]}}, "there are weights for 1 layers"),
        ({"layers": [1], "weights": {"ramp": {"a": [1, 1]}}}, "lists of 2 numbers for a"),
        ({"layers": [1], "weights": {"ramp": {"a": [1, 0], "b": [1, 0]}}}, "all weights are 0 at a point"),
        ({"layers": [1], "options": {"scael": 1}}, r"no option 'scael'(.|\n)*parts.0.options(.|\n)*'scale'"),
        ({"weights": [1, 1]}, "a part needs `filter`, `kind` or `layers`"),
        ({"kind": "mlp"}, "a part needs `weights` or `options`"),
        ({"kind": "mlps", "weights": [1, 1]}, "kind"),
    ],
)
def test_faults_of_parts(world, tmp_path, part, what):
    with pytest.raises(ValueError, match=what) if "needs" in what or what == "kind" else pytest.raises(RecallError, match=what):
        make_plan(a_run(world, tmp_path / "out", parts=[part]))
