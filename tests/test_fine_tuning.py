"""Training: what is learnt, from which tokens, and that neither a stop nor a second call changes the expert."""

import itertools
import json
import re
import shutil
import sys
from contextlib import contextmanager
from dataclasses import fields

import pytest
import torch
from safetensors import SafetensorError
from transformers import TrainerCallback
from trl.trainer.sft_config import SFTConfig

from recall_merge.files.ownership import MARKER
from recall_merge.files.record import verify_files
from recall_merge.files.rows import parse_rows
from recall_merge.models.load import hushed
from recall_merge.models.tokens import encode_rows
from recall_merge.runtime.errors import CheckpointError, DataError, OutputError, RunError
from recall_merge.training.checkpoints import open_folder, remove_folder
from recall_merge.training.fine_tuning import train
from recall_merge.training.settings import FIXED, OPEN, SETTING_OF, TrainSettings, check_arguments
from recall_merge.training.trl_private import SimilarLengths
from tiny import edit_json, fine_tuned, load_model, load_tensors, lora, make_model, make_tokenizer, save_model

ANIMALS = ["dog", "fox", "lazy dog", "quick brown fox", "other dog", "good dog", "bad fox", "brown dog"]
ROWS = parse_rows([{"prompt": f"is the {a} good?", "completion": "yes" if "dog" in a else "no"} for a in ANIMALS], where="rows")
SMALL = TrainSettings(rank=2, alpha=4, dropout=0.1, epochs=3, batch_size=2, learning_rate=5e-2)  # 12 steps


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(make_model("llama"), tmp_path_factory.mktemp("train") / "base", template=True)


@pytest.fixture(scope="module")
def expert(base, tmp_path_factory):
    """The expert of SMALL on ROWS, trained without a stop."""
    return train(base, ROWS, tmp_path_factory.mktemp("undisturbed") / "expert", SMALL)


class StopAt(TrainerCallback):
    """Breaks training off in the middle, as a kill would: right after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def same(first, second):
    a, b = load_tensors(first), load_tensors(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_settings_of_the_encoding():
    assert TrainSettings().encoding == {"template": True, "max_length": None, "turns": "last", "label_prompt": False}
    settings = TrainSettings(template=False, max_length=9, arguments={"completion_only_loss": False})
    assert settings.encoding == {"template": False, "max_length": 9, "turns": "last", "label_prompt": True}


def test_the_loss_is_that_of_trl(base, tmp_path):
    """Ours scores the positions that count; label smoothing of nothing is trl's own way through."""
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from recall_merge.training.trl_private import Trainer

    rows = encode_rows(ROWS, make_tokenizer(template=True), **SMALL.encoding)
    data = Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])
    losses = {}
    for kind in (SFTTrainer, Trainer):
        arguments = check_arguments(SMALL) | {"output_dir": str(tmp_path)}
        with hushed():
            model = load_model(base)
            trainer = kind(model=model, args=SFTConfig(**arguments), train_dataset=data, processing_class=make_tokenizer(template=True))
        batch = trainer.data_collator([data[i] for i in range(len(data))])
        model.train()
        loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(40))
        loss.backward()
        losses[kind] = (loss.detach(), model.model.layers[0].mlp.up_proj.weight.grad)
    for ours, theirs in zip(losses[Trainer], losses[SFTTrainer], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert trainer._skips_logits


def test_an_expert_learns_and_is_a_plain_peft_adapter_on_its_base(base, expert):
    from peft import PeftModel

    assert expert.steps == len(expert.losses) == 12
    assert sum(expert.losses[-4:]) < 0.9 * sum(expert.losses[:4])  # the head of random words is not trained, so it is slow
    config = json.loads((expert.folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert {"r": 2, "lora_alpha": 4}.items() <= config.items()
    with hushed():
        model = PeftModel.from_pretrained(load_model(base), expert.folder).eval()
    row = encode_rows(ROWS, make_tokenizer(template=True), **SMALL.encoding)[0]
    before, after = (
        float(m(torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss.detach()) for m in (load_model(base), model)
    )
    assert after < before


def test_the_result_stands_whole_and_alone(expert):
    assert sorted(file.name for file in expert.folder.iterdir()) == [
        MARKER,
        "adapter_config.json",
        "adapter_model.safetensors",
        "record.json",
    ]
    assert [path.name for path in expert.folder.parent.iterdir()] == ["expert"]
    assert verify_files(expert.folder)["settings"]["rank"] == 2


@pytest.mark.parametrize("stop", [2, 7, 9])  # before the first checkpoint, inside an epoch, right after one
def test_a_stop_changes_nothing(base, expert, tmp_path, stop):
    with pytest.raises(KeyboardInterrupt):
        train(base, ROWS, tmp_path / "expert", SMALL, callbacks=[StopAt(stop)])
    assert not (tmp_path / "expert").exists()
    result = train(base, ROWS, tmp_path / "expert", SMALL)
    assert result.resumed_at == (stop - 1) // 2 * 2  # a checkpoint each second step
    assert result.losses == expert.losses
    assert same(tmp_path / "expert", expert.folder)
    assert not (tmp_path / "expert.training.partial").exists()


def test_a_checkpoint_that_a_stop_left_in_pieces_is_passed_over(base, expert, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(base, ROWS, tmp_path / "expert", SMALL, callbacks=[StopAt(7)])
    work = tmp_path / "expert.training.partial"
    assert sorted(folder.name for folder in work.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    (work / "checkpoint-6" / "trainer_state.json").unlink()
    (work / "checkpoint-6" / "adapter_model.safetensors").write_bytes(b"half")
    assert train(base, ROWS, tmp_path / "expert", SMALL).resumed_at == 4
    assert same(tmp_path / "expert", expert.folder)


def test_checkpoints_of_another_training_are_not_used(base, expert, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(base, ROWS[:6], tmp_path / "expert", SMALL, callbacks=[StopAt(7)])
    assert train(base, ROWS, tmp_path / "expert", SMALL).resumed_at == 0
    assert same(tmp_path / "expert", expert.folder)


def test_what_is_there_and_valid_is_used_and_told_by_its_content(base, expert, tmp_path):
    kept = tmp_path / "kept"
    shutil.copytree(expert.folder, kept)
    again = train(base, ROWS, kept, SMALL)
    assert (again.reused, again.losses, again.steps) == (True, expert.losses, 12)

    file = kept / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(OutputError, match="the output folder is not empty"):
        train(base, ROWS, kept, SMALL)
    renewed = train(base, ROWS, kept, SMALL, overwrite=True)
    assert not renewed.reused
    assert same(kept, expert.folder)


@pytest.mark.parametrize("change", ["rows", "settings", "base", "one number of the base"])
def test_an_expert_of_something_else_is_not_used(base, expert, tmp_path, change):
    kept = tmp_path / "kept"
    shutil.copytree(expert.folder, kept)
    rows = ROWS[:-1] if change == "rows" else ROWS
    settings = SMALL.model_copy(update={"seed": 1}) if change == "settings" else SMALL
    other = fine_tuned(base, tmp_path / "other", seed=1, scale=0.01 if change == "base" else 0.0) if "base" in change else base
    if change == "one number of the base":
        file = other / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\x40")
    with pytest.raises(OutputError):
        train(other, rows, kept, settings)
    assert same(kept, expert.folder)


def test_folders_that_are_not_ours_are_left_alone(base, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="is no model that recall-merge made, and is not replaced"):
        train(base, ROWS, tmp_path / "mine", SMALL, overwrite=True)
    (tmp_path / "x.training.partial").mkdir()
    (tmp_path / "x.training.partial" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="a folder that is not ours lies where checkpoints are to be kept"):
        train(base, ROWS, tmp_path / "x", SMALL)


def stopped_before(number, work, action):
    """Do it, but stop before the n-th change of a file or folder below `work` itself; whether it came so far."""
    count = itertools.count()
    done = []

    def listen(event, given):
        change = event in {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"} or (event == "open" and "w" in str(given[1]))
        if not done and change and str(given[0]).startswith(str(work)) and next(count) == number:
            raise KeyboardInterrupt

    sys.addaudithook(listen)  # it cannot be taken away again, only silenced
    try:
        action()
    except KeyboardInterrupt:
        return True
    finally:
        done.append(True)
    return False


@pytest.mark.parametrize("number", range(20))
def test_a_stop_while_the_folder_of_checkpoints_is_made_or_removed(tmp_path, number):
    work = tmp_path / "x.training.partial"

    def all_of_it():
        assert open_folder(work, "one") is None
        (work / "checkpoint-1").mkdir()
        for name in ("optimizer.pt", "trainer_state.json"):
            (work / "checkpoint-1" / name).write_text("{}")
        assert open_folder(work, "one") == work / "checkpoint-1"
        open_folder(work, "two")
        (work / "log.txt").write_text("")
        remove_folder(work)

    if not stopped_before(number, work, all_of_it):
        assert number > 12 and not work.exists()
    for key in ("one", "two"):
        found = open_folder(work, key)  # never refused, and never in pieces
        assert found is None or (found / "optimizer.pt").exists()


def test_checkpoints_that_a_stop_left_beside_a_finished_expert_go(base, expert, tmp_path):
    target = shutil.copytree(expert.folder, tmp_path / "expert")
    open_folder(tmp_path / "expert.training.partial", "key")
    assert train(base, ROWS, target, SMALL).reused
    assert [path.name for path in tmp_path.iterdir()] == ["expert"]


def test_an_adapters_config_is_the_same_in_every_process(expert):
    """PEFT writes sets in the order of their hashes, which differ from process to process."""
    config = json.loads((expert.folder / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == 14 and config["target_modules"] == sorted(config["target_modules"])


def test_progress_is_told_step_by_step_and_nothing_is_printed(base, tmp_path, capfd):
    told = []

    class Listener:
        @contextmanager
        def stage(self, label, total, unit):
            told.append((label, total, unit))
            yield told.append

    train(base, ROWS, tmp_path / "expert", SMALL, progress=Listener())
    assert told == [("training", 12, "steps"), 0, *[1] * 12]
    assert capfd.readouterr() == ("", "")


def test_all_weights(base, tmp_path):
    settings = TrainSettings(kind="full", epochs=4, batch_size=2, learning_rate=1e-2)
    result = train(base, ROWS, tmp_path / "expert", settings)
    assert result.losses[-1] < 0.5 * result.losses[0]
    before, after = load_tensors(base), load_tensors(result.folder)
    assert before.keys() == after.keys()
    assert all(tensor.dtype == torch.float32 for tensor in after.values())
    assert all(not torch.equal(after[name], before[name]) for name in after)
    assert load_model(result.folder).config.vocab_size == 96
    assert (result.folder / "tokenizer.json").is_file()


def test_osf_leaves_the_largest_directions_of_each_map_and_gives_a_whole_model(base, tmp_path):
    settings = TrainSettings(kind="osf", epochs=3, batch_size=2, learning_rate=1e-2, targets=["q_proj", "down_proj"])
    result = train(base, ROWS, tmp_path / "expert", settings)
    assert result.losses[-1] < result.losses[0]
    before, after = load_tensors(base), load_tensors(result.folder)
    assert before.keys() == after.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {name for name in after if "q_proj" in name or "down_proj" in name}
    for name in changed:
        delta, (up, _, down) = after[name] - before[name], torch.linalg.svd(before[name])
        half = min(delta.shape) // 2
        assert (up[:, :half].mT @ delta).norm() < 0.4 * delta.norm()  # .7 by chance; the optimiser's steps leave right angles
        assert (delta @ down[:half].mT).norm() < 0.4 * delta.norm()
    assert load_model(result.folder).config.vocab_size == 96
    again = train(base, ROWS, tmp_path / "second", settings, init_from=result.folder)
    assert again.losses[0] < result.losses[0]


def test_a_stop_of_osf_changes_nothing(base, tmp_path):
    settings = TrainSettings(kind="osf", epochs=3, batch_size=2, learning_rate=1e-2)
    whole = train(base, ROWS, tmp_path / "whole", settings)
    with pytest.raises(KeyboardInterrupt):
        train(base, ROWS, tmp_path / "expert", settings, callbacks=[StopAt(7)])
    assert train(base, ROWS, tmp_path / "expert", settings).resumed_at == 6
    assert same(tmp_path / "expert", whole.folder)


def test_dora_brings_its_magnitudes(base, tmp_path):
    result = train(base, ROWS, tmp_path / "expert", SMALL.model_copy(update={"kind": "dora", "epochs": 1, "targets": ["q_proj", "v_proj"]}))
    names = {name.split(".")[-2] if name.endswith("weight") else name.split(".")[-1] for name in load_tensors(result.folder)}
    assert names == {"lora_A", "lora_B", "lora_magnitude_vector"}


def test_going_on_from_an_adapter(base, expert, tmp_path):
    result = train(base, ROWS, tmp_path / "on", SMALL, init_from=expert.folder)
    assert result.losses[0] < 0.9 * expert.losses[0], "it begins where the other ended"
    assert not same(tmp_path / "on", expert.folder)
    config = json.loads((tmp_path / "on" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)


def test_an_adapter_to_go_on_from_keeps_its_form(base, tmp_path):
    other = lora(base, tmp_path / "other", r=4, lora_alpha=4, target_modules=["q_proj"])
    with pytest.raises(RunError, match=r"`rank` is 2, but the adapter to continue from has 4"):
        train(base, ROWS, tmp_path / "on", SMALL, init_from=other)
    with pytest.raises(RunError, match="an adapter is to be trained, but the model to continue from is none"):
        train(base, ROWS, tmp_path / "on", SMALL, init_from=base)
    with pytest.raises(RunError, match="a whole model is to be trained, but the model to continue from is an adapter"):
        train(base, ROWS, tmp_path / "on", TrainSettings(kind="full"), init_from=other)


def test_arguments_of_trl_pass_through(base, tmp_path):
    result = train(base, ROWS, tmp_path / "expert", SMALL.model_copy(update={"arguments": {"max_steps": 3, "logging_steps": 3}}))
    assert (result.steps, len(result.losses)) == (3, 1)
    smoothed = SMALL.model_copy(update={"arguments": {"max_steps": 1, "label_smoothing_factor": 0.5, "train_sampling_strategy": "random"}})
    assert train(base, ROWS, tmp_path / "smoothed", smoothed).steps == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_decai": 0.1}, "trl's SFTConfig has no argument 'weight_decai'\n  fix: did you mean 'weight_decay'?"),
        ({"zzz": 0.1}, "no argument 'zzz'\n  fix: see trl's documentation"),
        ({"learning_rate": 0.1}, "'learning_rate' is a setting of its own, not one of `arguments`\n  fix: give it as `learning_rate`"),
        ({"num_train_epochs": 1}, "fix: give it as `epochs`"),
        ({"output_dir": "x"}, "'output_dir' cannot be changed: checkpoints lie beside the expert"),
        ({"packing": True}, "packing needs the length of a pack"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(RunError, match=message):
        check_arguments(TrainSettings(arguments=arguments))


SENDING = ["push_to_hub", "hub_model_id", "hub_token", "report_to", "trackio_space_id", "deepspeed", "fsdp_config", "accelerator_config"]


@pytest.mark.parametrize(
    "name", [*SENDING, "trust_remote_code", "torch_compile", "use_liger_kernel", "parallelism_config", "include_for_metrics"]
)
def test_an_argument_that_may_do_more_than_train_is_allowed_by_name_alone(base, name, tmp_path):
    settings = SMALL.model_copy(update={"arguments": {name: "x"}})
    with pytest.raises(RunError, match=f"'{name}' may do more than train.*\n.*\n.*--allow-argument {name}"):
        train(base, ROWS, tmp_path / "expert", settings)
    assert not list(tmp_path.iterdir())
    assert check_arguments(settings, [name])[name] == "x"


def test_every_argument_of_trl_is_open_or_may_do_more_or_is_ours():
    """A new version's arguments are closed until somebody has read what they do; no open one reads like those that leave the machine."""
    names = {field.name for field in fields(SFTConfig) if field.init}
    younger = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # since transformers 5.23
    assert (OPEN - younger) | FIXED.keys() | SETTING_OF.keys() <= names
    words = r"hub|report|trackio|project|run_name|deepspeed|fsdp|config|remote|compile|liger|dir|path|log_level|debug|backend|plugin|kernel"
    assert not [name for name in OPEN if re.search(words, name)]


def test_all_faults_of_arguments_at_once():
    with pytest.raises(RunError) as caught:
        check_arguments(TrainSettings(arguments={"zzz": 1, "output_dir": "x", "learning_rate": 1}))
    assert len(caught.value.faults) == 3


def test_what_trl_and_peft_refuse_is_said(base, tmp_path):
    with pytest.raises(RunError, match="trl refuses these arguments"):
        train(base, ROWS, tmp_path / "a", SMALL.model_copy(update={"arguments": {"lr_scheduler_type": "nonsense"}}))
    with pytest.raises(RunError, match=r"peft refuses: .*nonsense"):
        train(base, ROWS, tmp_path / "b", SMALL.model_copy(update={"targets": ["nonsense"]}))


def test_settings_of_adapters_have_no_place_where_all_weights_are_trained():
    with pytest.raises(ValueError, match="rank, dropout: of adapters only"):
        TrainSettings(kind="full", rank=4, dropout=0.5)
    with pytest.raises(ValueError, match="`protect` goes with the kinds lora, dora and full"):
        TrainSettings(kind="osf", protect={})
    settings = TrainSettings(kind="full")
    assert TrainSettings(**settings.model_dump()) == settings


def test_a_base_that_cannot_be_used(base, tmp_path):
    with pytest.raises(CheckpointError, match="there is no usable tokenizer"):
        train(tmp_path, ROWS, tmp_path / "expert", SMALL)
    quantised = tmp_path / "quantised"
    shutil.copytree(base, quantised)
    edit_json(quantised / "config.json", quantization_config={"quant_method": "gguf"})
    with pytest.raises(CheckpointError, match="the weights are quantised"):
        train(quantised, ROWS, tmp_path / "expert", SMALL)
    with pytest.raises(DataError, match="there are no rows to train on"):
        train(base, [], tmp_path / "expert", SMALL)


def test_batches_of_like_length():
    lengths = [1, 9, 2, 8, 3, 7, 4, 6, 5]
    sampler = SimilarLengths(lengths, 2, seed=0)
    order = list(sampler)
    assert sorted(order) == list(range(9))
    assert order == list(sampler), "the same epoch, the same order"
    pairs = [(lengths[a], lengths[b]) for a, b in zip(order[:-1:2], order[1::2], strict=True)]
    assert all(abs(a - b) <= 2 for a, b in pairs), "one row of nine is left over, so a pair may step over it"
    assert pairs != sorted(pairs), "and not from short to long"
    sampler.set_epoch(1)
    assert list(sampler) != order


@pytest.mark.parametrize(
    "error", [RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"), SafetensorError("I/O error: full")]
)
def test_a_full_disk_is_said_and_training_goes_on_afterwards(base, expert, tmp_path, monkeypatch, error):
    import peft

    def full(*_, **__):
        raise error

    with monkeypatch.context() as patched, pytest.raises(OutputError, match="what was trained cannot be written"):
        patched.setattr(peft.PeftModel, "save_pretrained", full)
        train(base, ROWS, tmp_path / "expert", SMALL)
    assert not (tmp_path / "expert").exists()
    assert same(train(base, ROWS, tmp_path / "expert", SMALL).folder, expert.folder)


@pytest.mark.parametrize(("epochs", "said"), [(1, "step 1 leaves NaN or infinity in"), (3, "the loss of step 2 is nan")])
def test_a_training_that_diverges_ends_with_words_and_leaves_no_expert(base, tmp_path, epochs, said):
    settings = TrainSettings(kind="full", epochs=epochs, batch_size=8, learning_rate=1e39, arguments={"warmup_steps": 0})
    with pytest.raises(RunError, match=f"the training has diverged: {said}") as caught:
        train(base, ROWS, tmp_path / "expert", settings)
    assert caught.value.faults[0].where == str(tmp_path / "expert")
    assert not (tmp_path / "expert").exists()
