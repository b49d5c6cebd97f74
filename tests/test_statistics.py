"""Statistics: the moments are those of the inputs, input statistics fits its expert and nothing else, and `aligned` merges by them."""

import json
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import save_file
from typer.testing import CliRunner

from dense import cut_moment
from recall_merge import MergeRun, RecallError, make_plan, merge
from recall_merge.cli.app import app
from recall_merge.files.checkpoint import open_checkpoint
from recall_merge.files.statistics import open_statistics
from recall_merge.maths.methods.informed import aligned, condition, regmean
from recall_merge.maths.trimming import Draws
from recall_merge.merging import spans
from recall_merge.merging.spans import in_spans
from recall_merge.merging.statistics import make_statistics
from recall_merge.models.input_moments import InputSketches, inputs_of_whole
from recall_merge.models.layerwise import LayerwiseForward
from recall_merge.models.reads import linear_maps
from recall_merge.models.tokens import EncodedRow
from tiny import edit_json, load_model, load_tensors, lora, merged_by_peft, save_model, seeded, write_rows

ROWS = [{"prompt": f"is the {word} {verb}?", "completion": " yes"} for word in ("fox", "dog", "film") for verb in ("quick", "lazy", "good")]
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "mixtral": ["q_proj"]}


@pytest.fixture
def world(bases, tmp_path, request):
    """A base of the family that the test asks for, two adapters on it, and rows."""
    family = getattr(request, "param", "llama")
    base = shutil.copytree(bases(family), tmp_path / "base")
    for seed, name in enumerate("ab"):
        lora(base, tmp_path / name, seed=seed, r=4, lora_alpha=8, target_modules=TARGETS[family])
        write_rows(tmp_path / f"{name}.jsonl", ROWS[seed::2])
    return tmp_path


def a_run(world, experts="ab", **settings):
    entries = [{"name": entry, "path": str(world / entry)} if isinstance(entry, str) else entry for entry in experts]
    return MergeRun.model_validate(
        {"base": str(world / "base"), "experts": entries, "method": "aligned", "out": {"path": world / "out"}} | settings
    )


def statistics(world, rank=8, **options):
    return [make_statistics(a_run(world, name, samples={"path": str(world / f"{name}.jsonl")}), rank=rank, **options) for name in "ab"]


# --- mathematics ----------------------------------------------------------------------------------------------------------------------


def moment(seed, size=12, rows=40):
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) @ torch.randn(
        size, size, generator=torch.Generator().manual_seed(seed + 9)
    )
    return x.mT @ x / rows


def test_aligned_is_regmean_on_scaled_moments_solved_another_way():
    full = [moment(seed) for seed in range(3)]
    generator = torch.Generator().manual_seed(7)
    base, deltas = torch.randn(5, 12, generator=generator), [torch.randn(5, 12, generator=generator) for _ in full]
    weights = [0.2, 0.3, 0.5]
    found = aligned(base, deltas, weights, moments=[cut_moment(one, 12) for one in full], offdiagonal=0.9, ridge=1e-9)
    scaled = [cut_moment(one / one.diagonal().mean(), 12) for one in full]
    wanted = regmean(base, deltas, weights, moments=scaled, offdiagonal=0.9, ridge=1e-9)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_alike_inputs_give_the_mean_and_one_expert_gives_itself():
    same, generator = cut_moment(moment(3), 4), torch.Generator().manual_seed(8)
    base, deltas = torch.randn(5, 12, generator=generator), [torch.randn(5, 12, generator=generator) for _ in range(2)]
    found = aligned(base, deltas, [0.5, 0.5], moments=[same, same], ridge=1e-9)
    torch.testing.assert_close(found, base + (deltas[0] + deltas[1]) / 2, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(aligned(base, deltas[:1], [1.0], moments=[same], ridge=1e-9), base + deltas[0], rtol=1e-5, atol=1e-5)


def test_a_few_large_inputs_do_not_hide_what_the_others_tell():
    """Massive activations: one input is a thousand times as large as the rest, which then are a millionth of its square."""
    read = [torch.diag(torch.tensor([1e6, *numbers])) for numbers in ([1.0, 0.01], [0.01, 1.0])]
    deltas = [torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([[0.0, -1.0, -1.0]])]
    found = aligned(torch.zeros(1, 3), deltas, [0.5, 0.5], moments=[cut_moment(one, 3) for one in read])
    # sum of the moments 0.505e-6 * 3, of the signed ones 0.495e-6 * 3, times 1e6 / 1e6; the ridge 1e-6 takes its part
    expected = 0.495 * 3 / (0.505 * 3 + 1)
    torch.testing.assert_close(found, torch.tensor([[0.0, expected, -expected]]), rtol=1e-3, atol=1e-6)


def test_condition_bounds_the_true_one():
    parts, weights = [cut_moment(moment(seed), 3) for seed in range(2)], [0.5, 0.5]
    total = sum(0.5 * part.shrunk(0.9).dense() for part in parts) + 1e-6 * torch.eye(12)
    assert torch.linalg.cond(total) <= condition(parts, weights) * (1 + 1e-9)


# --- from a model ---------------------------------------------------------------------------------------------------------------------


TOKENS = [[3, 4, 5, 6, 7], [8, 9], [10, 11, 12], [13, 14, 15, 16, 17, 18, 19, 20]]
ROWS_OF_TOKENS = [EncodedRow(ids, [-100, *ids[1:]]) for ids in TOKENS]


def draw(module):
    return Draws(0, module, ("a",)).streams[0]


def seen_by_layer(folder, *, threads=1, rank=1000, limit=10):
    """What the linear maps of a model read, seen block by block in padded batches."""
    base = open_checkpoint(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recall_merge.models.hidden_states.make_batches.__defaults__", (limit,))
        with LayerwiseForward(folder, TOKENS, base.layers, threads=threads) as forward:
            maps = {name: shape for name, shape in linear_maps(forward.model).items() if "head" not in name and "embed_out" not in name}
            sketches, found = InputSketches(maps, rank, draw), []
            forward.watch(maps, sketches.fold)
            for layer in range(base.layers.blocks + 1):
                forward.step({name: base.read(name) for name in base.tensors if base.layers.of(name) == layer})
                found += sketches.finish(threads)
    return found


def seen_whole(folder, *, gradients=None, rank=1000):
    model = load_model(folder)
    return inputs_of_whole(model, ROWS_OF_TOKENS, InputSketches(linear_maps(model), rank, draw), gradients=gradients)


def modules_of(model):
    """The linear maps that are modules, by the names of their weights."""
    modules = dict(model.named_modules())
    return {name: modules[name.removesuffix(".weight")] for name, shape in linear_maps(model).items() if len(shape) == 2}


@pytest.mark.parametrize("see", [seen_by_layer, seen_whole])
@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_moments_are_those_of_the_inputs(bases, family, see):
    """Every map's own inputs, caught one by one and without padding, give the moment of its group."""
    model = load_model(bases(family))
    found = see(bases(family))
    caught, modules = {}, modules_of(model)

    def catch(name):
        return lambda module, args: caught.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))

    handles = [modules[name].register_forward_pre_hook(catch(name)) for group in found for name, _ in group.maps]
    for ids in TOKENS:
        with torch.inference_mode():
            model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    assert sum(len(group.maps) for group in found) == len(caught)
    for group in found:
        for name, _ in group.maps:
            rows = torch.cat(caught[name]).double()
            assert group.tokens == len(rows) == sum(map(len, TOKENS))
            torch.testing.assert_close(group.moment.dense().double(), rows.mT @ rows / len(rows), rtol=1e-4, atol=1e-5)
            assert modules[name].weight.shape[group.axis] == rows.shape[1]
    if family == "llama":  # q, k and v read one state, gate and up another
        assert sorted(len(group.maps) for group in found) == sorted([3, 1, 2, 1] * 2 + [1] * (see is seen_whole))  # and the head


def test_threads_and_a_low_rank_change_nothing_but_the_directions(bases):
    one, two = (seen_by_layer(bases("llama"), threads=threads, rank=3) for threads in (1, 2))
    for group, other, whole in zip(one, two, seen_whole(bases("llama")), strict=False):
        assert group.maps == other.maps == whole.maps
        assert torch.equal(group.moment.factor, other.moment.factor) and torch.equal(group.moment.rest, other.moment.rest)
        torch.testing.assert_close(group.moment.diagonal, whole.moment.diagonal, rtol=1e-4, atol=1e-6)
        wanted = cut_moment(whole.moment.dense(), 3).factor
        torch.testing.assert_close(group.moment.factor @ group.moment.factor.mT, wanted @ wanted.mT, rtol=1e-3, atol=1e-4)


def test_gradients_are_those_of_the_models_own_predictions(bases):
    """Against autograd, which gives the gradient by the output of a map as that by a bias of its own at every position."""
    model, generator, wanted = load_model(bases("llama")), torch.Generator().manual_seed(0), {}
    for ids in TOKENS:
        outputs = {}

        def keep(name, outputs=outputs):
            return lambda module, args, output: outputs.setdefault(name, output)

        handles = [module.register_forward_hook(keep(name)) for name, module in modules_of(model).items()]
        logits = model(torch.tensor([ids])).logits[0]
        drawn = torch.multinomial(logits[:-1].detach().softmax(-1), 1, generator=generator)
        likelihood = logits[:-1].log_softmax(-1).gather(1, drawn).sum()
        for name, gradient in zip(outputs, torch.autograd.grad(likelihood, list(outputs.values())), strict=True):
            wanted[name] = wanted.get(name, 0) + gradient[0].double().square().sum(0) / len(TOKENS)
        for handle in handles:
            handle.remove()
    found = {}
    seen_whole(bases("llama"), gradients=found)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-8)


def test_what_follows_the_blocks_is_seen_too_by_running_the_whole_model(tmp_path):
    """OPT may map its states to another width behind its blocks, and from one before them."""
    settings = {"hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    with seeded(0):
        model = transformers.OPTForCausalLM(transformers.OPTConfig(vocab_size=96, max_position_embeddings=130, **settings))
    base = save_model(model, tmp_path / "base")
    lora(base, tmp_path / "a", r=4, target_modules=["q_proj"])
    write_rows(tmp_path / "a.jsonl", ROWS)
    stats = make_statistics(a_run(tmp_path, "a", samples={"path": str(tmp_path / "a.jsonl"), "count": 4}))
    assert any("project_out" in name for name in stats.facts["tensors"])
    assert any(note.startswith("whole models were run, not block by block") for note in stats.facts["notes"])


@pytest.mark.parametrize("world", ["llama", "gpt2", "mixtral"], indirect=True)
def test_merge_by_statistics_equals_least_squares_over_the_inputs(world):
    made = statistics(world, rank=1000)  # all directions: nothing is lost
    result = merge(a_run(world, options={"ridge": 1e-6}))
    assert set(result.record["statistics"]["experts"]) == {"a", "b"}
    assert all(1 <= number < 1e9 for number in result.record["statistics"]["condition"].values())
    base, found = load_tensors(world / "base"), load_tensors(world / "out")
    dense = [load_tensors(merged_by_peft(world / "base", world / name, world / f"{name}-full")) for name in "ab"]
    told = 0
    for name, start in base.items():
        deltas = [full[name] - start for full in dense]
        known = [stats.moment(name) for stats in made]
        wanted = start + sum(deltas) / 2
        if all(known) and any(delta.any() for delta in deltas):
            told += 1
            axis = known[0][1]
            turn = (lambda tensor: tensor.mT) if axis == 0 else (lambda tensor: tensor)
            moments = [one.dense().double() for one, _ in known]
            shrunk = [(0.9 * g + 0.1 * g.diagonal().diag()) / g.diagonal().mean() for g in moments]
            answered = sum(turn(delta).double() @ g for delta, g in zip(deltas, shrunk, strict=True)) / 2
            change = answered @ torch.linalg.inv(sum(shrunk) / 2 + 1e-6 * torch.eye(len(shrunk[0]), dtype=torch.float64))
            wanted = start + turn(change).float()
        torch.testing.assert_close(found[name], wanted, rtol=1e-3, atol=2e-4, msg=name)
    assert told >= 2


def test_tables_of_tokens_are_merged_in_spans(world, monkeypatch):
    """They are averaged, as they are no linear maps: `aligned` needs no more memory for them than `linear`."""
    statistics(world)
    whole = load_tensors(merge(a_run(world)).path)
    monkeypatch.setattr(spans, "SPAN", 1000)
    plan = make_plan(a_run(world, out={"path": world / "again"}))
    assert in_spans(plan, plan.base.embedding) and not in_spans(plan, "model.layers.0.self_attn.q_proj.weight")
    again = load_tensors(merge(a_run(world, out={"path": world / "again"})).path)
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_statistics_are_small_and_hold_no_text(world):
    stats = statistics(world, rank=2)[0]
    text = (world / "a" / "stats.json").read_text()
    assert not any(word in text for row in ROWS for word in row["prompt"].split() if len(word) > 3)
    assert stats.nbytes < load_tensors(world / "base")["model.embed_tokens.weight"].nbytes * 2
    assert json.loads(text)["samples"] == 5


def test_the_command_says_what_it_will_take(world):
    words = ["stats", "--base", world / "base", "-e", f"a={world / 'a'}", "-s", world / "a.jsonl", "--set", "samples.count=2"]
    first, second, *_ = CliRunner().invoke(app, [*map(str, words)]).stdout.splitlines()
    assert re.fullmatch(r"about [\d.]+ s \(to choose among 5 rows: about [\d.]+ s of it\), and [\d.]+ MB of memory", first)
    assert second.startswith("wrote input statistics")
    assert CliRunner().invoke(app, [*map(str, words), "--quiet"]).stdout.startswith("wrote input statistics")


# --- what can be wrong ----------------------------------------------------------------------------------------------------------------


def test_missing_statistics_are_noted(world):
    make_statistics(a_run(world, "a", samples={"path": str(world / "a.jsonl")}))
    plan = make_plan(a_run(world))
    assert plan.notes == ["expert 'b' has no input statistics: all its inputs count alike"]
    merge(a_run(world))


def test_stale_and_damaged_statistics_are_refused(world):
    statistics(world)
    edit_json(world / "a" / "stats.json", expert="0" * 64)
    (world / "b" / "stats.json").write_text("{}")
    with pytest.raises(RecallError) as caught:
        make_plan(a_run(world))
    assert [fault.what for fault in caught.value.faults] == [
        "the input statistics of expert 'a' were made for another state of it",
        "the input statistics are in a format that this version does not know",
    ]
    assert all("recall stats" in fault.fix for fault in caught.value.faults)


def test_statistics_belong_to_every_bit_of_a_full_expert(world):
    merged_by_peft(world / "base", world / "a", world / "full")
    run = a_run(world, ["full"], samples={"path": str(world / "a.jsonl")})
    make_statistics(run)
    make_plan(run)
    with (world / "full" / "model.safetensors").open("r+b") as file:
        file.seek(-3000, 2)
        byte = file.read(1)[0]
        file.seek(-3000, 2)
        file.write(bytes([byte ^ 16]))
    with pytest.raises(RecallError, match="the input statistics of expert 'full' were made for another state of it"):
        make_plan(run)


def test_statistics_may_lie_elsewhere(world):
    run = a_run(world, "a", samples={"path": str(world / "a.jsonl")})
    make_statistics(run, folder=world / "statistics" / "a")
    assert open_statistics(world / "a") is None
    entries = [{"name": "a", "path": str(world / "a"), "stats": str(world / "statistics" / "a")}]
    assert make_plan(a_run(world, entries)).statistics[0] is not None
    merged = merge(a_run(world, entries, out={"path": world / "merged"})).path
    assert str(world) not in (merged / "record.json").read_text()
    entries[0]["stats"] = str(world / "nowhere")
    with pytest.raises(RecallError, match="this folder has no input statistics"):
        make_plan(a_run(world, entries))


def test_fisher_asks_for_gradients_which_statistics_have_if_they_are_asked_for(world):
    run = a_run(world, "ab", method="fisher")
    made = statistics(world, rank=1000)
    assert not any(stats.has_gradients for stats in made)
    with pytest.raises(RecallError) as caught:
        make_plan(run)
    assert [(fault.what, fault.fix) for fault in caught.value.faults] == [
        (
            f"the input statistics of expert '{name}' hold no gradients, which `fisher` takes",
            "make them again with `recall stats --gradients`",
        )
        for name in "ab"
    ]
    before = {name: made[0].moment(name)[0] for name in made[0].facts["tensors"]}
    [after, _] = statistics(world, rank=1000, gradients=True)
    merge(run)
    for name, moment in before.items():
        again = after.moment(name)[0]
        torch.testing.assert_close(moment.dense(), again.dense(), rtol=0.02, atol=1e-3)  # bfloat16
        assert moment.gradient is None and again.gradient.shape == load_tensors(world / "base")[name].shape[:1]


def test_statistics_made_earlier_are_read(world):
    """Format 3 had no hashes; it and the first files of format 4 always have gradients."""
    statistics(world, gradients=True)
    facts = json.loads((world / "a" / "stats.json").read_text())
    for key in ("blake3", "stats.safetensors", "notes"):
        del facts[key]
    (world / "a" / "stats.json").write_text(json.dumps(facts | {"format": 3}))
    assert open_statistics(world / "a").has_gradients
    merge(a_run(world, method="fisher"))


def test_an_expert_whose_states_are_not_finite_leaves_no_statistics(world):
    tensors = load_tensors(world / "a")
    next(iter(tensors.values())).fill_(float("nan"))
    save_file(tensors, world / "a" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecallError, match="expert 'a' holds NaN or infinity in"):
        statistics(world)
