"""Mixtures of experts: each expert's inputs are those of the tokens that are routed to it, and each expert's matrix is aligned by them."""

import json
from functools import partial

import pytest
import torch

from dense import cut_moment
from recall_merge import MergeRun, RecallError, make_plan, merge
from recall_merge.files.checkpoint import open_checkpoint
from recall_merge.maths.moments import weighted_sum
from recall_merge.maths.trimming import Draws
from recall_merge.merging.statistics import make_statistics
from recall_merge.models.input_moments import InputSketches, inputs_of_whole
from recall_merge.models.layerwise import LayerwiseForward
from recall_merge.models.reads import linear_maps
from recall_merge.models.tokens import EncodedRow
from recall_merge.report.anatomy import Models, anatomy
from recall_merge.runtime.errors import NotLayerwise
from recall_merge.runtime.progress import Silent
from recall_merge.runtime.sealed import sealed
from tiny import fine_tuned, load_model, load_tensors, write_rows

APART = ("mixtral", "qwen3_moe")  # one tensor an expert in the files
WHOLE = ("gpt_oss", "llama4_text", "granitemoe")  # one tensor for all; of the first two (E, i, o)
TOKENS = [[3, 4, 5, 6, 7], [8, 9], [10, 11, 12], [13, 14, 15, 16, 17, 18, 19, 20], [21] * 3]
ROWS = [{"prompt": f"is the {word} {verb}?", "completion": " yes"} for word in ("fox", "dog", "film") for verb in ("quick", "lazy", "good")]


@pytest.fixture
def world(base_of, tmp_path, request):
    """Two full experts on a base of the kind that the test asks for, and rows."""
    base = base_of(request.param)
    for seed, name in enumerate("ab", 1):
        fine_tuned(base, tmp_path / name, seed)
        write_rows(tmp_path / f"{name}.jsonl", ROWS[seed - 1 :: 2])

    def run(experts="ab", **settings):
        entries = [{"name": name, "path": str(tmp_path / name)} for name in experts]
        return MergeRun.model_validate(
            {"base": str(base), "experts": entries, "method": "aligned", "out": {"path": tmp_path / "out"}} | settings
        )

    def make(rank, **options):
        runs = [run(name, samples={"path": str(tmp_path / f"{name}.jsonl"), "count": 4}) for name in "ab"]
        return [make_statistics(each, rank=rank, **options) for each in runs]

    run.statistics, run.folder, run.base = make, tmp_path, base
    return run


def sketches(model):
    return InputSketches(linear_maps(model), 1000, lambda name: Draws(0, name, ("a",)).streams[0])


def seen_by_layer(folder, *, threads=1, one_by_one=True):
    base, found = open_checkpoint(folder), []
    with LayerwiseForward(folder, TOKENS, base.layers, threads=threads, one_by_one=one_by_one) as forward:
        seen = sketches(forward.model)
        forward.watch(seen.parameters, seen.fold)
        for layer in range(base.layers.blocks + 1):
            forward.step({name: base.read(name) for name in base.tensors if base.layers.of(name) == layer})
            found += seen.finish(threads)
    return found


def seen_whole(folder, gradients=None):
    model = load_model(folder)
    return inputs_of_whole(model, [EncodedRow(ids, [-100, *ids[1:]]) for ids in TOKENS], sketches(model), gradients=gradients)


def routed(model):
    """What each expert of each mixture reads, {parameter: {expert: (n, i)}}: routed by hand from what its module is given, in float64."""
    found, handles = {}, []

    def route(name, module, args):
        hidden, *routing = args
        count, turned = len(module.gate_up_proj), getattr(module, "is_transposed", not routing)
        if routing:
            rows = [hidden[(routing[0] == expert).any(1)].double() for expert in range(count)]
        else:  # Llama 4 hands every expert all tokens, times the router's scores: zeros where it is not chosen
            rows = [x[x.any(1)].double() for x in hidden.view(count, -1, hidden.shape[-1])]
        for expert, x in enumerate(rows):
            matrix = module.gate_up_proj[expert].double()
            both = x @ (matrix if turned else matrix.mT)
            if hasattr(module, "gate_up_proj_bias"):  # GPT-OSS
                inner = module._apply_gate(both + module.gate_up_proj_bias[expert].double())
            else:
                gate, up = both.chunk(2, dim=-1)
                inner = module.act_fn(gate) * up
            for part, inputs in (("gate_up_proj", x), ("down_proj", inner)):
                found.setdefault(f"{name}.{part}", {}).setdefault(expert, []).append(inputs)

    for name, module in model.named_modules():
        if any(part == "gate_up_proj" for part, _ in module.named_parameters(recurse=False)):
            handles.append(module.register_forward_pre_hook(partial(route, name)))
    for ids in TOKENS:
        with torch.no_grad():
            model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return {name: {expert: torch.cat(rows) for expert, rows in experts.items()} for name, experts in found.items()}


# --- what the experts read --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("see", [seen_by_layer, partial(seen_by_layer, threads=2), seen_whole])
@pytest.mark.parametrize("kind", [*APART, *WHOLE])
def test_an_expert_reads_the_tokens_that_are_routed_to_it(base_of, kind, see):
    wanted = routed(load_model(base_of(kind)))
    found = {map_: group for group in see(base_of(kind)) for map_ in group.maps}
    assert len(wanted) >= 2
    for name, experts in wanted.items():
        assert sum(bool(len(rows)) for rows in experts.values()) >= 2
        for expert, rows in experts.items():
            if not len(rows):
                assert (name, expert) not in found
                continue
            group = found[name, expert]
            assert group.tokens == len(rows)
            torch.testing.assert_close(group.moment.dense().double(), rows.mT @ rows / len(rows), rtol=1e-4, atol=1e-6)


def test_inputs_in_padded_batches_are_refused(base_of):
    with pytest.raises(NotLayerwise, match="its linear maps read tensors of shape"):
        seen_by_layer(base_of("mixtral"), one_by_one=False)


@pytest.mark.parametrize("kind", [*APART, *WHOLE])
def test_gradients_of_a_mixture_are_those_of_its_experts_answers(base_of, kind):
    """The gradient by an expert's bias is the sum over its tokens of that by its answers: here for one token, which is its square."""
    model, found = load_model(base_of(kind)), {}
    ids = [3, 4]
    inputs_of_whole(model, [EncodedRow(ids, [-100, *ids[1:]])], sketches(model), gradients=found, seed=0)
    maps = [name for name, shape in linear_maps(model).items() if len(shape) == 3]
    assert maps and all(found[name].shape[0] == len(model.get_parameter(name)) for name in maps)
    assert all(bool(found[name].any()) for name in maps)
    logits = model(torch.tensor([ids])).logits[0, :1]
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(0))
    parameters = [model.get_parameter(name).requires_grad_() for name in maps]
    logits = model(torch.tensor([ids])).logits[0, :1]
    gradients = torch.autograd.grad(logits.log_softmax(-1).gather(1, drawn).sum(), parameters)
    reads = {map_: group for group in inputs_of_whole(model, [EncodedRow(ids, [-100, *ids[1:]])], sketches(model)) for map_ in group.maps}
    checked = 0
    for name, gradient in zip(maps, gradients, strict=True):
        for expert in range(len(gradient)):
            if (name, expert) in reads and reads[name, expert].tokens == 1:  # then dW = g x^T
                group = reads[name, expert]
                own = gradient[expert].double() if group.axis == 1 else gradient[expert].double().mT
                squares = own.square().sum(1) / group.moment.dense().double().trace()
                torch.testing.assert_close(found[name][expert], squares, rtol=1e-3, atol=1e-10)
                checked += 1
    assert checked


# --- a merge by them --------------------------------------------------------------------------------------------------------------------


def least_squares(base, deltas, moments, method):
    """The matrix (o, i) that the method's formula gives for dense moments, in float64."""
    shrunk = [0.9 * g + 0.1 * g.diagonal().diag() for g in (moment.dense().double() for moment in moments)]
    eye = torch.eye(len(shrunk[0]), dtype=torch.float64)
    if method == "aligned":
        shrunk = [g / g.diagonal().mean() for g in shrunk]
        answered, seen = sum(delta @ g for delta, g in zip(deltas, shrunk, strict=True)) / 2, sum(shrunk) / 2 + 1e-6 * eye
    else:
        shrunk = [g + 1e-6 * eye * sum(shrunk).diagonal().mean() / 2 for g in shrunk]
        answered, seen = sum(delta @ g for delta, g in zip(deltas, shrunk, strict=True)), sum(shrunk)
    return base.double() + answered @ torch.linalg.inv(seen)


@pytest.mark.parametrize("method", ["aligned", "regmean"])
@pytest.mark.parametrize("world", [*APART, *WHOLE], indirect=True)
def test_each_experts_matrix_is_the_least_squares_solution_over_its_own_inputs(world, method):
    made = world.statistics(rank=3)
    result = merge(world(method=method))
    base, found = load_tensors(world.base), load_tensors(world.folder / "out")
    experts = [load_tensors(world.folder / name) for name in "ab"]
    names = [name for name in made[0].facts["tensors"] if base[name].ndim == 3 or ".experts." in name]
    assert len(names) >= 4
    for name in names:
        assert 1 <= result.record["statistics"]["condition"][name] < 1e9
        every = []
        for number in range(len(base[name])) if base[name].ndim == 3 else [None]:
            start, merged, *theirs = ((t if number is None else t[number]) for t in (base[name], found[name], *(e[name] for e in experts)))
            known = [stats.moment(name, number) for stats in made]
            every.append(known[0][0].rest)
            turn = (lambda tensor: tensor) if known[0][1] == 1 else (lambda tensor: tensor.mT)
            deltas = [turn(own - start).double() for own in theirs]
            wanted = turn(least_squares(turn(start), deltas, [moment for moment, _ in known], method))
            assert float((merged.double() - wanted).abs().max() / wanted.abs().max()) < 1e-5, (name, number)
        assert base[name].ndim == 2 or not torch.equal(every[0], every[1])


@pytest.mark.parametrize("world", ["mixtral", "gpt_oss"], indirect=True)
def test_experts_that_read_little_share_the_mean_of_their_block(world):
    """With more directions than tokens, every expert of every mixture."""
    assert world.statistics(rank=1)[0].mixtures == (0, 8)
    few = world.statistics(rank=1000)[0]
    assert few.mixtures == (8, 8)
    owners = {str(owner) for name, (owner, _) in few.facts["tensors"].items() if "experts" in name}
    assert len(owners) == 4  # in two blocks, of what goes into the experts and of what is between their maps
    notes = make_plan(world()).notes
    what = "of the 8 experts in the mixtures of 'a' read fewer than 1000 tokens in its input statistics: they share the mean of their block"
    assert f"8 {what}" in notes
    assert any(
        note.startswith("the input statistics of expert 'b' are of ") and "fewer than their 1000 directions" in note for note in notes
    )
    merge(world())


def test_the_mean_of_moments_is_the_moment_of_all_inputs():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, 6, generator=generator) for n in (5, 9, 1)]
    moments = [cut_moment(x.mT @ x / len(x), 6) for x in parts]
    x = torch.cat(parts)
    shares = [len(part) / len(x) for part in parts]
    mean = weighted_sum(moments, shares, 6, Draws(0, "", ("a",)).streams[0])
    torch.testing.assert_close(mean.dense(), x.mT @ x / len(x), rtol=1e-4, atol=1e-5)
    cut = weighted_sum(moments, shares, 2, Draws(0, "", ("a",)).streams[0])
    assert cut.factor.shape == (6, 2)
    torch.testing.assert_close(cut.diagonal, mean.diagonal)


@pytest.mark.parametrize("world", ["mixtral", "gpt_oss"], indirect=True)
def test_fisher_and_the_report_know_mixtures(world):
    world.statistics(rank=3, gradients=True)
    merge(world(method="fisher"))
    alone = merge(world("a", out={"path": world.folder / "alone"}))
    models = Models(base=world.base, experts={"a": world.folder / "a"}, statistics={"a": world.folder / "a"})
    tables = anatomy(alone.path, models, identities=["it"], cache=world.folder / "anatomy.json", progress=Silent())
    missed = [value for row in tables["missed"]["rows"] for value in row if value is not None]
    assert len(missed) == 2 and max(missed) < 1e-6  # in both blocks, nothing of the only expert


@pytest.mark.parametrize("world", ["gpt_oss"], indirect=True)
def test_groups_that_do_not_fit_a_mixture_are_refused(world):
    world.statistics(rank=3)
    facts = json.loads((world.folder / "a" / "stats.json").read_text())
    name = next(name for name, (owner, _) in facts["tensors"].items() if isinstance(owner, list))
    for owner, what in [
        (facts["tensors"][name][0][:3], f"the input statistics of expert 'a' do not fit the inputs of '{name}'"),
        (facts["tensors"][name][0][0], f"the input statistics of expert 'a' do not fit the inputs of '{name}'"),
        ([], "the input statistics are damaged"),
        ([1, 2, 3, 4], "the input statistics are damaged"),
        (["9"] * 4, "the input statistics lack '9.factor'"),
    ]:
        tensors = facts["tensors"] | {name: [owner, facts["tensors"][name][1]]}
        del (kept := dict(facts))["blake3"]
        (world.folder / "a" / "stats.json").write_text(sealed(kept | {"tensors": tensors}))
        with pytest.raises(RecallError) as caught:
            make_plan(world())
        assert caught.value.faults[0].what == what
