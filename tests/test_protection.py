"""Protected training: the penalty and its gradients beside a dense reference in float64, and what it does to real adapters."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from recall_merge import MergeRun
from recall_merge.continual.workspace import init
from recall_merge.files.checkpoint import open_checkpoint
from recall_merge.maths.deltas import LowRank
from recall_merge.maths.moments import Moment, weighted_sum
from recall_merge.maths.protection import dense_pull, energy, free_directions, pull, shared_directions
from recall_merge.maths.trimming import Draws
from recall_merge.merging.statistics import make_statistics
from recall_merge.models.load import hushed, load_model, load_tokenizer
from recall_merge.models.own_text import own_texts
from recall_merge.models.tokens import encode_rows
from recall_merge.runtime.errors import RecallError, RunError, WorkspaceError
from recall_merge.runtime.sealed import read_sealed, sealed
from recall_merge.runtime.sections import parse
from recall_merge.training.earlier import OWN
from recall_merge.training.fine_tuning import _make_model, train
from recall_merge.training.protection import Protection, moved_answers
from recall_merge.training.settings import Protect, TrainSettings, check_arguments
from recall_merge.training.trained_maps import trained_maps
from test_fine_tuning import ROWS, StopAt
from tiny import load_tensors, lora, make_model, save_model, write_rows
from workspaces import SETTINGS, make_workspace, teach, tree, write_tasks

OLD = [{"prompt": f"the {word} fox jumps", "completion": " over"} for word in ("quick", "lazy", "brown", "good", "bad", "other")]
SMALL = {"rank": 2, "alpha": 4, "epochs": 3, "batch_size": 2, "learning_rate": 5e-2}  # 12 steps


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def a_moment(seed=0, size=7, rank=3):
    return Moment(random(size, rank, seed=seed), random(size, seed=seed + 50).abs())


def draw(seed=0):
    return Draws(seed, "w", ("a",)).streams[0]


# --- mathematics ----------------------------------------------------------------------------------------------------------------------


def test_the_penalty_and_its_gradients_are_those_of_a_dense_reference():
    moment, up, down = a_moment(), random(5, 2, seed=1), random(2, 7, seed=2)
    wide = [part.double().requires_grad_() for part in (up, down)]
    moved = wide[0] @ wide[1]
    (moved @ Moment(moment.factor.double(), moment.rest.double()).dense() @ moved.mT).trace().backward()
    found = pull(LowRank(up, down), moment)
    wanted = float(((up @ down).double() @ moment.dense().double() @ (up @ down).double().mT).trace())
    assert float(found.energy) == pytest.approx(wanted, rel=1e-5)
    assert energy(LowRank(up, down), moment) == pytest.approx(wanted, rel=1e-5) == energy(up @ down, moment)
    torch.testing.assert_close(found.up.double(), wide[0].grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.down.double(), wide[1].grad, rtol=1e-5, atol=1e-5)
    whole, gradient = dense_pull(up @ down, moment)
    assert float(whole) == pytest.approx(wanted, rel=1e-5)
    torch.testing.assert_close(gradient, 2 * (up @ down) @ moment.dense(), rtol=1e-4, atol=1e-4)


def test_a_sum_of_moments_keeps_its_diagonal_and_its_leading_directions():
    moments, weights = [a_moment(seed, rank=2) for seed in range(3)], [0.2, 3.0, 1.0]
    wanted = sum(weight * moment.dense() for moment, weight in zip(moments, weights, strict=True))
    torch.testing.assert_close(weighted_sum(moments, weights, 6, draw()).dense(), wanted)
    cut = weighted_sum(moments, weights, 4, draw())
    assert cut.factor.shape == (7, 4)
    torch.testing.assert_close(cut.diagonal, wanted.diagonal())
    assert 0 < float(torch.linalg.matrix_norm(cut.dense() - wanted, 2)) < 0.3 * float(torch.linalg.matrix_norm(wanted, 2))


def test_free_directions_are_the_leading_ones_of_the_pencil():
    new, old = Moment(random(7, 3), torch.zeros(7)), a_moment(9)
    found = free_directions(new, old, 2)
    raised = old.dense().double() + 1e-3 * old.diagonal.mean().double() * torch.eye(7)
    root = torch.linalg.cholesky(raised)
    inverse = torch.linalg.inv(root)
    vectors = torch.linalg.eigh(inverse @ new.dense().double() @ inverse.mT).eigenvectors
    wanted = (inverse.mT @ vectors).mT.flip(0)[:2]
    cosines = (found.double() * wanted).sum(1) / wanted.norm(dim=1)
    assert cosines.abs().tolist() == pytest.approx([1, 1], abs=1e-4)
    assert found.norm(dim=1).tolist() == pytest.approx([1, 1])
    assert len(free_directions(new, old, 7)) == 3  # no more than the new task has


def test_shared_directions_are_the_leading_ones_of_the_sum():
    new, old = (Moment(random(7, 3, seed=seed), torch.zeros(7)) for seed in range(2))
    whole = sum(moment.dense() / moment.diagonal.sum() for moment in (new, old))
    leading = torch.linalg.eigh(whole).eigenvectors.mT.flip(0)[:2]
    assert (shared_directions(new, old, 2, draw()) * leading).sum(1).abs().tolist() == pytest.approx([1, 1], abs=1e-4)


# --- trained maps ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, and an expert of another task with its statistics."""
    folder = tmp_path_factory.mktemp("protection")
    base = save_model(make_model("llama"), folder / "base", template=True)
    old = lora(base, folder / "old", r=2, target_modules=["q_proj", "down_proj", "v_proj"])
    rows = write_rows(folder / "old.jsonl", OLD)
    return base, {"old": statistics(base, old, rows)}


def statistics(base, expert, rows):
    run = {"base": str(base), "experts": [{"name": "old", "path": str(expert)}], "method": "linear", "samples": {"path": str(rows)}}
    return make_statistics(MergeRun.model_validate(run), rank=8)


def trained(world, out, earlier=True, rows=ROWS, **settings):
    base, statistics = world
    protect = settings.pop("protect", {"strength": 1e3})
    wanted = TrainSettings.model_validate(SMALL | settings | ({"protect": protect} if protect is not None else {}))
    return train(base, rows, out, wanted, earlier=statistics if earlier else None)


def record(result):
    return json.loads((result.folder / "record.json").read_text())


def same(first, second):
    a, b = load_tensors(first.folder), load_tensors(second.folder)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "lora", "rank": 2, "alpha": 4},
        {"kind": "dora", "rank": 2, "alpha": 4},
        {"kind": "full"},
    ],
    ids=lambda settings: settings["kind"],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("further", [False, True])
def test_what_a_map_adds_are_the_gradients_of_its_own_answers(bases, tmp_path, family, settings, further):
    """Beside autograd, through the forward pass of the module itself."""
    if further and settings["kind"] == "full":
        pytest.skip("all weights begin where they are")
    base = bases(family)
    wanted = TrainSettings.model_validate(settings)
    start = train(base, ROWS, tmp_path / "start", wanted.model_copy(update={"epochs": 1, "batch_size": 4})).folder if further else None
    with hushed():
        model = _make_model(base, wanted, start)
    checkpoint = open_checkpoint(base)
    maps = trained_maps(model, checkpoint, checkpoint.tensors.keys() - checkpoint.token_tensors)
    assert len(maps) == {"llama": 14, "gpt2": 8}[family]
    for number, parameter in enumerate(model.parameters()):
        if parameter.requires_grad:
            parameter.data += 0.1 * random(*parameter.shape, seed=number)
            parameter.grad = None
    modules = {name: module for name, module in model.named_modules() if hasattr(module, "weight") or hasattr(module, "lora_A")}
    for stored, each in list(maps.items())[:4]:
        module = modules.get(stored.removesuffix(".weight")) or next(
            m
            for name, m in modules.items()
            if name.endswith(stored.removesuffix(".weight").split("model.", 1)[-1]) and hasattr(m, "lora_A")
        )
        moment = a_moment(1, size=each.weight().shape[1])
        x = torch.cat([moment.factor, moment.rest.sqrt().diag()], dim=1).mT  # rows whose moment this is
        before = x @ each.weight().mT
        bias = getattr(getattr(module, "base_layer", module), "bias", None)
        with torch.enable_grad():
            answers = module(x) - (0 if bias is None else bias.detach())
            moved = (answers - before).square().sum()
            moved.backward()
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad and parameter is not bias]
        wanted_gradients = [parameter.grad.clone() for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        found = each.add_pull(moment, 1.0)
        assert float(found) == pytest.approx(moved.item(), rel=1e-3)
        for parameter, gradient in zip(parameters, wanted_gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))


def test_a_map_without_statistics_is_left_alone(world):
    base, statistics = world
    with hushed():
        model = _make_model(base, TrainSettings(rank=2), None)
    maps = trained_maps(model, open_checkpoint(base), {"model.layers.1.mlp.down_proj.weight"})
    assert [*maps] == ["model.layers.1.mlp.down_proj.weight"]
    assert all(math.isclose(moved, 0) for moved in moved_answers(maps, statistics, open_checkpoint(base))["old"] if moved is not None)


# --- training -------------------------------------------------------------------------------------------------------------------------


def test_no_strength_gives_the_bytes_of_a_training_without_protection(world, tmp_path):
    plain = trained(world, tmp_path / "plain", protect=None)
    for name, options in {"zero": {"protect": {"strength": 0}}, "nothing to protect": {"earlier": False}}.items():
        assert same(plain, trained(world, tmp_path / name, **options))
        assert "protection" not in record(trained(world, tmp_path / name, **options))


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_a_strong_protection_leaves_old_answers_where_they_were(world, tmp_path, kind):
    settings = {"kind": kind, "epochs": 25, "batch_size": 2, "learning_rate": 3e-3}  # 100 steps
    settings |= {} if kind == "full" else {"rank": 2, "alpha": 4}
    moved = {}
    for strength in (1e-9, 1e2, 1e9):
        wanted = TrainSettings(protect=Protect(strength=strength), **settings)
        layers = record(train(world[0], ROWS, tmp_path / f"{strength}", wanted, earlier=world[1]))["protection"]["moved"]["old"]
        assert layers[0] is layers[-1] is None  # no map is trained there
        moved[strength] = max(layer for layer in layers if layer is not None)
    assert moved[1e-9] > 10 * moved[1e2] and moved[1e-9] > 1e-2
    assert moved[1e9] < 1e-4


@pytest.mark.parametrize("how", ["isolated", "mixed"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_rows_of_a_begin_where_the_new_task_has_more_than_the_old(world, how, kind):
    """Before the first step, by the inputs of a model of transformers' own."""
    base, statistics = world
    with hushed():
        model = _make_model(base, TrainSettings(rank=4, kind=kind), None)
    rows = encode_rows(ROWS, load_tokenizer(base), template=True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    Protection(statistics, Protect(rows_of_a=how), open_checkpoint(base), model, rows=rows, seed=0)
    after = dict(model.named_parameters())
    assert {name for name in after if not torch.equal(after[name], before[name])} == {name for name in before if "lora_A" in name}
    assert model.training and all(parameter.requires_grad == (".lora_" in name) for name, parameter in after.items())
    inputs = []
    down = dict(model.named_modules())["base_model.model.model.layers.1.mlp.down_proj"]
    down.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0].detach()))
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row.input_ids]))
    new = torch.cat(inputs)
    old, _ = statistics["old"].moment("model.layers.1.mlp.down_proj.weight")

    def share(directions):  # the inputs' energy under the new task beside that under the old one
        return float((new @ directions.mT).square().sum() / len(new) / energy(directions, old))

    at = "base_model.model.model.layers.{}.lora_A.default.weight"
    found, drawn = (names[at.format("1.mlp.down_proj")].detach() for names in (after, before))
    assert share(found[:2]) > 3 * share(drawn[:2])  # of both ways the first half is free
    assert float(found.norm(dim=1).mean()) == pytest.approx(float(drawn.norm(dim=1).mean()), rel=1e-4)
    q, v = (nn.functional.normalize(after[at.format(f"0.self_attn.{name}_proj")]) for name in "qv")
    torch.testing.assert_close(q, v)  # they read the same


def test_rows_of_a_are_of_new_adapters_alone(world, tmp_path):
    first = train(world[0], ROWS, tmp_path / "first", TrainSettings(**SMALL))
    settings = TrainSettings(protect=Protect(rows_of_a="isolated"), **SMALL)
    with pytest.raises(RunError, match="an adapter that is trained further has its rows of A already"):
        train(world[0], ROWS, tmp_path / "on", settings, init_from=first.folder, earlier=world[1])
    with pytest.raises(ValueError, match="is of adapters only"):
        TrainSettings(kind="full", protect=Protect(rows_of_a="isolated"))


def test_the_answers_that_are_said_to_move_are_those_that_move(world, tmp_path):
    """The share by which answers move, from statistics of rank enough, against the model's own maps on the old rows."""
    result = trained(world, tmp_path / "new", protect={"strength": 1e-9}, targets=["q_proj"])
    layers = record(result)["protection"]["moved"]["old"]
    tensors, base = load_tensors(result.folder), load_tensors(world[0])
    for layer in (1, 2):
        at = f"model.layers.{layer - 1}.self_attn.q_proj"
        change = 2 * tensors[f"base_model.model.{at}.lora_B.weight"] @ tensors[f"base_model.model.{at}.lora_A.weight"]
        moment, _ = world[1]["old"].moment(f"{at}.weight")
        wanted = float(
            (change @ moment.dense() @ change.mT).trace() / (base[f"{at}.weight"] @ moment.dense() @ base[f"{at}.weight"].mT).trace()
        )
        assert layers[layer] == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(("strength", "rows_of_a"), [("auto", "free"), (10.0, "isolated")])
@pytest.mark.parametrize("stop", [2, 7])
def test_a_stop_changes_nothing(world, tmp_path, strength, rows_of_a, stop):
    settings = TrainSettings(protect=Protect(strength=strength, tolerance=0.05, rows_of_a=rows_of_a), **SMALL)
    whole = train(world[0], ROWS, tmp_path / "whole", settings, earlier=world[1])
    with pytest.raises(KeyboardInterrupt):
        train(world[0], ROWS, tmp_path / "expert", settings, earlier=world[1], callbacks=[StopAt(stop)])
    result = train(world[0], ROWS, tmp_path / "expert", settings, earlier=world[1])
    assert result.resumed_at == (stop - 1) // 2 * 2
    assert same(whole, result) and record(whole)["protection"] == record(result)["protection"]


def test_the_automatic_strength_follows_what_has_moved(world, tmp_path):
    """Loose or tight, answers move about as far as is tolerated, and the strength is what that takes."""
    found = {}
    for tolerance in (0.3, 0.03):
        made = trained(
            world, tmp_path / f"{tolerance}", protect={"strength": "auto", "tolerance": tolerance}, epochs=30, learning_rate=1e-2
        )
        protection = record(made)["protection"]
        moved = [layer for layer in protection["moved"]["old"] if layer is not None]
        found[tolerance] = (protection["strength"], (sum(moved) / len(moved)) ** 0.5)
    assert found[0.03][0] > 3 * found[0.3][0]
    assert found[0.03][1] < 2 * 0.03 < found[0.3][1] < 2 * 0.3


def test_another_protection_is_another_expert(world, tmp_path):
    first = trained(world, tmp_path / "expert")
    assert trained(world, tmp_path / "expert").reused
    other = train(
        world[0], ROWS, tmp_path / "expert", TrainSettings(protect=Protect(strength=10), **SMALL), earlier=world[1], overwrite=True
    )
    assert not other.reused and first.folder == other.folder


# --- a workspace ----------------------------------------------------------------------------------------------------------------------


def workspace(tmp_path, base, **settings):
    tmp_path.mkdir(exist_ok=True)
    write_tasks(tmp_path, "abc")
    return make_workspace(tmp_path / "ws", base, **({"training__protect": {"strength": 1e3, "base": 0}} | settings))


def test_a_stage_protects_the_stages_before_it(llama, tmp_path):
    folder = workspace(tmp_path, llama, method="linear")
    first = teach(folder, tmp_path, "a")
    assert first.moved == {} and not any("protect" in each for each in first.notes)
    second = teach(folder, tmp_path, "b")
    third = teach(folder, tmp_path, "c", start="last")
    assert [*second.moved] == ["a"] and [*third.moved] == ["a", "b"]
    unprotected = teach(workspace(tmp_path / "other", llama, method="linear", training__protect=None), tmp_path / "other", "a").state
    assert unprotected.stages[0].expert.fingerprint == first.stage.expert.fingerprint


def test_the_newest_expert_alone_is_the_model_where_it_began_from_the_last_merge(llama, tmp_path):
    folder = workspace(tmp_path, llama, strategy="newest")
    teach(folder, tmp_path, "a")
    with pytest.raises(WorkspaceError, match="all earlier stages would be forgotten") as error:
        teach(folder, tmp_path, "b", start="base")
    assert "leave out --from" in error.value.faults[0].fix
    learned = teach(folder, tmp_path, "b")
    assert learned.stage.start == "last"
    before, after = (load_tensors(folder / "merges" / str(stage)) for stage in (1, 2))
    adapter = load_tensors(folder / learned.stage.expert.path)
    for name, tensor in before.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        factors = [adapter.get(f"{module}.lora_{part}.weight") for part in "BA"]
        wanted = tensor if None in factors else tensor + 2 * factors[0] @ factors[1]
        torch.testing.assert_close(after[name], wanted)
    with pytest.raises(WorkspaceError, match="was not trained from the last merge"):
        teach(folder, tmp_path, "c", expert=str(lora(llama, tmp_path / "given", r=2)), same_base=True)


def test_nothing_to_protect_is_said(llama, tmp_path):
    folder = workspace(tmp_path, llama, method="linear", stats_rank=0)
    teach(folder, tmp_path, "a")
    assert "no earlier stage was protected: none has input statistics" in teach(folder, tmp_path, "b").notes


def test_experts_from_elsewhere_are_protected_too(llama, tmp_path):
    other = lora(llama, tmp_path / "other", r=2)
    statistics(llama, other, write_rows(tmp_path / "old.jsonl", OLD))
    folder = workspace(tmp_path, llama, method="linear", training__protect={"strength": 1, "statistics": {"other": str(other)}})
    assert [*teach(folder, tmp_path, "a").moved] == ["base", "other"]


def test_faults_of_what_is_to_be_protected_come_before_any_work(llama, bases, tmp_path):
    """Statistics of another base, of other shapes, of no map in common, and none at all: each with its place, all at once."""
    made = {"shapes": save_model(make_model("llama", hidden_size=48), tmp_path / "shapes-base"), "maps": bases("gpt2")}
    made["other"] = save_model(make_model("llama", seed=7), tmp_path / "other-base")
    rows, folders = write_rows(tmp_path / "old.jsonl", OLD), {"none": str(tmp_path)}
    for name, base in made.items():
        folders[name] = str(lora(base, tmp_path / name, r=2))
        statistics(base, folders[name], rows)
        if name != "other":  # as if the base were the same
            file = tmp_path / name / "stats.json"
            facts = read_sealed(file)
            file.write_text(sealed({**facts, "base": open_checkpoint(llama).fingerprint}))
    folder = workspace(tmp_path, llama, method="linear", training__protect={"statistics": folders})
    before = tree(folder)
    with pytest.raises(WorkspaceError) as error:
        teach(folder, tmp_path, "a")
    found = {fault.where: fault.what for fault in error.value.faults}
    wanted = {
        "none": "are not there",
        "shapes": "do not fit the inputs",
        "maps": "no linear map in common",
        "other": "were made on another base",
    }
    assert all(wanted[name] in found[folders[name]] for name in wanted) and tree(folder) == before


def test_no_protection_beside_a_scaled_loss():
    with pytest.raises(RunError, match="cannot be protected in float16"):
        check_arguments(TrainSettings(protect=Protect(), arguments={"fp16": True}))


@pytest.mark.parametrize(
    ("protect", "words"),
    [
        ({"strength": -1}, "greater than or equal to 0"),
        ({"strength": "strong"}, "strength"),
        ({"tolerance": 0}, "greater than 0"),
        ({"strenght": 1}, "did you mean 'strength'"),
    ],
)
def test_bad_settings(protect, words):
    with pytest.raises(RunError) as error:
        parse(TrainSettings, {"protect": protect}, where="training")
    assert any(words in f"{fault.what} {fault.where} {fault.fix}" for fault in error.value.faults)


# --- the base itself ------------------------------------------------------------------------------------------------------------------


def test_a_base_writes_texts_that_the_seed_alone_decides(llama):
    model, tokenizer = load_model(llama, None)
    state = torch.get_rng_state()
    first = own_texts(model, tokenizer, seed=1, count=20, tokens=6)
    assert torch.equal(torch.get_rng_state(), state) and 0 < len(first) <= 20 and len(set(first)) > 5
    assert own_texts(model, tokenizer, seed=1, count=20, tokens=6) == first != own_texts(model, tokenizer, seed=2, count=20, tokens=6)
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(RunError, match="neither a start nor an end token"):
        own_texts(model, tokenizer, seed=1)


def test_a_workspace_protects_the_base_from_its_first_stage_on(llama, tmp_path):
    data = write_tasks(tmp_path)
    space = make_workspace(tmp_path / "ws", llama, method="linear", strategy="newest", training__protect={"strength": 1e3, "base": 0.5})
    assert [*teach(space, data, "a").moved] == ["base"]
    own = tree(space / "statistics" / "base")
    assert {*own} == {"key.json", "own_text.json", "own_text.jsonl", "stats.json", "stats.safetensors"}
    assert [*teach(space, data, "b", start="last").moved] == ["base", "a"]
    assert tree(space / "statistics" / "base") == own  # made once


def test_a_new_workspace_learns_each_task_on_the_last_and_protects_what_it_knows(llama, tmp_path):
    """The default: a merge method, or another kind of training, is another way."""
    data = write_tasks(tmp_path)
    small = {key: value for key, value in SETTINGS.items() if key != "strategy"}
    init(tmp_path / "ws", str(llama), small)
    learned = [teach(tmp_path / "ws", data, task) for task in "ab"]
    assert [each.stage.start for each in learned] == ["base", "last"] and [*learned[1].moved] == ["base", "a"]
    assert [each["name"] for each in json.loads((tmp_path / "ws/merges/2/record.json").read_text())["run"]["experts"]] == ["b"]
    merged = teach(tmp_path / "ws", data, "c", method="linear")
    assert merged.stage.start == "base"
    assert [each["name"] for each in json.loads((tmp_path / "ws/merges/3/record.json").read_text())["run"]["experts"]] == [*"abc"]
    for number, sets in enumerate(
        (
            {"method": "linear"},
            {"strategy": "one_shot"},
            {"training.kind": "osf"},
            {"training.protect": None},
            {"training": {"protect": None}},
        )
    ):
        assert init(tmp_path / f"{number}", str(llama), sets).settings["training"]["protect"] is None


def test_a_base_that_cannot_write_is_told_before_any_work(llama, tmp_path):
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if (base / file).is_file():
            facts = json.loads((base / file).read_text())
            (base / file).write_text(json.dumps({key: value for key, value in facts.items() if key not in {"bos_token", "eos_token"}}))
    data = write_tasks(tmp_path)
    space = make_workspace(tmp_path / "ws", base, strategy="newest", training__protect={})
    before = tree(space)
    with pytest.raises(RecallError, match="neither a start nor an end token"):
        teach(space, data, "a")
    assert tree(space) == before


def test_the_base_is_no_task(llama):
    with pytest.raises(ValueError, match="`base` is no task"):
        Protect(statistics={"base": "folder"})


def test_the_base_counts_as_it_is_told(world, tmp_path):
    """A base that counts twice is protected as a task that is given twice."""
    old = world[1]["old"]

    def answers(earlier, **protect):
        settings = TrainSettings(protect=Protect(strength=30, rows_of_a="free", **protect), **SMALL)
        return load_tensors(train(world[0], ROWS, tmp_path / "expert", settings, earlier=earlier, overwrite=True).folder)

    twice, own = answers({"old": old, "older": old}), answers({OWN: old}, base=2.0)
    for name, tensor in twice.items():
        torch.testing.assert_close(own[name], tensor, rtol=1e-3, atol=1e-5)
