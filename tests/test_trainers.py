"""Adapters as other trainers leave them: the same merge as PEFT's plain folder, to the bit, and nothing beside them is opened.

Each layout is made here of a real PEFT adapter, by the renames and files of the trainer's own code, which its function names.
"""

import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import save_file

from recall_merge import MergeRun, make_plan, merge
from recall_merge.files.adapter import open_adapter
from recall_merge.files.checkpoint import open_checkpoint
from recall_merge.files.ownership import MARKER
from recall_merge.runtime.errors import CheckpointError
from tiny import TEMPLATE, edit_json, load_model, load_tensors, lora, make_model, make_tokenizer, merged_by_peft, quiet, seeded
from workspaces import make_workspace, teach, write_tasks

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPENED: list[tuple[str, str]] = []  # events since the last test began, and what they are about
sys.addaudithook(lambda event, args: OPENED.append((event, str(args[0]))) if event in ("open", "pickle.find_class") else None)

# what get_peft_regex of unsloth_zoo gives for a text model
PARTS = "self_attn|attention|attn|mixer|mlp|feed_forward|ffn|dense|mixer"
LINEAR = f"(?:{'|'.join(MODULES)})"
UNSLOTH_REGEX = (
    rf"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:{PARTS}).*?\.{LINEAR})"
    rf"|(?:\bmodel\.layers\.[\d]{{1,}}(?!.*\.experts\.\d)\..*?(?:{PARTS}).*?\.(?:{LINEAR}))"
)
SETTINGS = {  # how each trainer sets PEFT up
    "unsloth": {"r": 4, "lora_alpha": 4, "target_modules": UNSLOTH_REGEX, "modules_to_save": ["lm_head", "embed_tokens"]},
    "unsloth, a list": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": MODULES},
    "axolotl": {"r": 4, "lora_alpha": 8, "target_modules": MODULES},
    "axolotl, FSDP2": {"r": 4, "lora_alpha": 8, "target_modules": MODULES},
    "llama-factory": {"r": 4, "lora_alpha": 8, "target_modules": MODULES, "modules_to_save": ["embed_tokens", "lm_head"]},
    "tinker": {"r": 4, "lora_alpha": 32, "target_modules": [*MODULES, "lm_head"]},
}
ON_DISK = {"unsloth": "unsloth/tiny-bnb-4bit", "unsloth, a list": "unsloth/tiny-unsloth-bnb-4bit"}  # the base, if it is not the folder


def unsloth(folder: Path, base: Path) -> None:
    """unsloth 2026.10.9: `fix_lora_auto_mapping` of unsloth_zoo/hf_utils.py; `_patch_adapter_config` of its studio."""
    mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama", "unsloth_fixed": True}
    add_keys(folder, auto_mapping=mapping, unsloth_training_method="qlora", unsloth_load_in_4bit=True, peft_version="0.18.1")
    make_tokenizer(template=True).save_pretrained(folder)
    (folder / "README.md").write_text("---\nbase_model: unsloth/tiny-bnb-4bit\ntags: [unsloth]\n---\n")
    leave_behind(folder, "training_args.bin", "checkpoint-2/optimizer.pt", "checkpoint-2/rng_state.pth", "checkpoint-2/scheduler.pt")
    checkpoint(folder, 2)


def axolotl(folder: Path, base: Path) -> None:
    """axolotl 0.19.0: `save_initial_configs` of train.py, `_save` of core/trainers/base.py, core/trainers/constants.py, utils/tee.py."""
    make_tokenizer(template=True).save_pretrained(folder)
    shutil.copy(base / "config.json", folder)
    (folder / "debug.log").write_text("loading\n")
    (folder / "tokens_state.json").write_text('{"total": 9, "trainable": 9}')
    leave_behind(folder, "training_args.bin", "checkpoint-4/global_step4/mp_rank_00_model_states.pt", "checkpoint-4/rng_state_0.pth")
    (folder / "checkpoint-4" / "latest").write_text("global_step4")
    (folder / "checkpoint-4" / "zero_to_fp32.py").write_text("raise SystemExit(1)\n")
    checkpoint(folder, 4)


def axolotl_fsdp2(folder: Path, base: Path) -> None:
    """The same under FSDP2 with activation checkpointing: `save_fsdp2_lora_adapter` of integrations/expert_parallel/shard.py takes the
    names of `named_parameters`, in which torch's wrapper stays."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing, checkpoint_wrapper

    with quiet():
        model = PeftModel.from_pretrained(load_model(base), folder)
        blocks = {type(module) for name, module in model.named_modules() if name.rpartition(".")[0].endswith(".layers")}
        apply_activation_checkpointing(model, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=lambda module: type(module) in blocks)
        named = {name: part.data for name, part in model.named_parameters() if "lora_" in name}
        save_file({name: part.contiguous() for name, part in get_peft_model_state_dict(model, state_dict=named).items()}, folder / WEIGHTS)
    assert all("_checkpoint_wrapped_module" in name for name in load_tensors(folder))
    axolotl(folder, base)
    (folder / "checkpoint-4" / "pytorch_model_fsdp_0").mkdir()
    leave_behind(folder, "checkpoint-4/pytorch_model_fsdp_0/__0_0.distcp", "checkpoint-4/optimizer.bin")


def llama_factory(folder: Path, base: Path) -> None:
    """LLaMA-Factory 0.9.5: extras/constants.py, train/callbacks.py, webui/common.py; transformers' trainer."""
    make_tokenizer(template=True).save_pretrained(folder)
    for name in ("all_results.json", "train_results.json", "eval_results.json", "trainer_state.json"):
        (folder / name).write_text('{"epoch": 1.0}')
    for name in ("trainer_log.jsonl", "running_log.txt", "llamaboard_config.yaml", "training_args.yaml", "training_loss.png"):
        (folder / name).write_text("{}\n")
    leave_behind(folder, "training_args.bin", "value_head.bin", "checkpoint-9/optimizer.pt", "checkpoint-10/optimizer.pt")
    checkpoint(folder, 9)
    checkpoint(folder, 10)
    save_file({"v_head.summary.weight": torch.ones(1, 32)}, folder / "value_head.safetensors")  # of PPO and reward models


def tinker(folder: Path, base: Path) -> None:
    """tinker-cookbook 0.6.1: `build_name_remaps` of weights/_merge_utils.py; the archive holds these two files."""
    save_file({in_tinkers_words(key): part for key, part in load_tensors(folder).items() if "base_layer" not in key}, folder / WEIGHTS)
    add_keys(folder, target_modules="all-linear")
    (folder / "README.md").unlink()
    assert "base_model.model.model.unembed_tokens.lora_A.weight" in load_tensors(folder)


LAYOUTS = {
    "unsloth": unsloth,
    "unsloth, a list": unsloth,
    "axolotl": axolotl,
    "axolotl, FSDP2": axolotl_fsdp2,
    "llama-factory": llama_factory,
    "tinker": tinker,
}


class Opened(Exception):
    """Raised by whoever loads the pickles of `leave_behind`."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


def leave_behind(folder: Path, *files: str) -> None:
    """Pickles, as `torch.save` writes them or like those of old."""
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(pickle.dumps(Opened()))


def checkpoint(folder: Path, step: int) -> None:
    """An earlier state in a subfolder, as transformers' trainer saves it: another adapter than the last one."""
    below = folder / f"checkpoint-{step}"
    below.mkdir(exist_ok=True)
    shutil.copy(folder / CONFIG, below)
    save_file({key: part + 1 for key, part in load_tensors(folder).items()}, below / WEIGHTS)
    (below / "trainer_state.json").write_text("{}")
    make_tokenizer().save_pretrained(below)


def add_keys(folder: Path, **keys) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | keys, indent=2))


def in_tinkers_words(key: str) -> str:
    return key.replace("base_model.model.lm_head.", "base_model.model.model.unembed_tokens.")


def a_run(base: Path, folder: Path, out: Path, **expert) -> MergeRun:
    entry = {"name": "theirs", "path": str(folder)} | expert
    return MergeRun.model_validate({"base": str(base), "experts": [entry], "method": "linear", "out": {"path": str(out)}})


def merged(base: Path, folder: Path, out: Path, **expert) -> dict[str, torch.Tensor]:
    """The tensors of a merge of one adapter alone; planned first."""
    run = a_run(base, folder, out, **expert)
    make_plan(run)
    merge(run)
    return load_tensors(out)


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.fixture(scope="module")
def layouts(llama, tmp_path_factory):
    """The base; and by layout the folder as PEFT saves it, and as the trainer does. Read them."""
    made = {}
    for number, (name, settings) in enumerate(SETTINGS.items()):
        home = tmp_path_factory.mktemp("layouts")
        plain = lora(llama, home / "plain", seed=number, **settings)
        theirs = shutil.copytree(plain, home / "theirs")
        add_keys(theirs, base_model_name_or_path=ON_DISK.get(name, str(llama)))
        LAYOUTS[name](theirs, llama)
        made[name] = plain, theirs
    return llama, made


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_trainers_folder_is_merged_as_pefts_own(layouts, tmp_path, name):
    base, made = layouts
    plain, theirs = made[name]
    same = {"same_base": True} if name in ON_DISK else {}
    reference = merged(base, plain, tmp_path / "plain")
    OPENED.clear()
    ours = merged(base, theirs, tmp_path / "ours", **same)
    read = {Path(file) for event, file in OPENED if event == "open" and file.startswith(str(theirs))}
    assert not [event for event, _ in OPENED if event == "pickle.find_class"]
    assert {file.suffix for file in read} <= {".json", ".safetensors", ".jinja", ".model", ".txt"}
    assert theirs / WEIGHTS in read and all(file.parent == theirs for file in read)
    assert not any(file.name.startswith(("value_head", "trainer_", "training_")) for file in read)
    assert_same(ours, reference)
    peft = load_tensors(merged_by_peft(base, plain, tmp_path / "peft"))
    for tensor in ours:
        torch.testing.assert_close(ours[tensor], peft[tensor], rtol=1e-5, atol=1e-6)
    changed = {key for key in peft if not torch.equal(ours[key], load_tensors(base)[key])}
    assert len(changed) >= 14  # seven modules of two blocks
    left = {file.name for file in (tmp_path / "ours").iterdir()}
    assert not {
        file for file in left if file.endswith((".bin", ".pt", ".log")) or file.startswith(("trainer_", "value_head", "checkpoint"))
    }


def test_names_that_wrappers_leave(llama, tmp_path):
    plain = lora(llama, tmp_path / "plain", r=4, target_modules=MODULES)
    reference = merged(llama, plain, tmp_path / "reference")
    wrapped = {
        "compiled": lambda key: f"_orig_mod.{key}",
        "by block": lambda key: key.replace(".layers.1.", ".layers.1._orig_mod."),
        "fsdp": lambda key: (
            f"_fsdp_wrapped_module.{key.replace('.layers.0.', '.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.')}"
        ),
        "ddp": lambda key: f"module.{key}",
        "adapter": lambda key: key.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."),
    }
    for name, rename in wrapped.items():
        theirs = shutil.copytree(plain, tmp_path / name)
        save_file({rename(key): part for key, part in load_tensors(plain).items()}, theirs / WEIGHTS)
        assert_same(merged(llama, theirs, tmp_path / f"{name} merged"), reference)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_adapter_in_half_precision(llama, tmp_path, dtype):
    plain = lora(llama, tmp_path / "plain", r=4, target_modules=MODULES)
    half = {key: part.to(dtype) for key, part in load_tensors(plain).items()}
    save_file({key: part.float() for key, part in half.items()}, plain / WEIGHTS)
    theirs = shutil.copytree(plain, tmp_path / "theirs")
    save_file(half, theirs / WEIGHTS)
    assert_same(merged(llama, theirs, tmp_path / "ours"), merged(llama, plain, tmp_path / "reference"))


def test_settings_that_are_null_or_new(llama, tmp_path):
    plain = lora(llama, tmp_path / "plain", r=4, target_modules=MODULES)
    reference = merged(llama, plain, tmp_path / "reference")
    config = json.loads((plain / CONFIG).read_text())
    kept = {"r", "lora_alpha", "peft_type", "target_modules", "base_model_name_or_path"}
    add_keys(plain, **dict.fromkeys(config.keys() - kept), a_setting_of_tomorrow=None)
    assert_same(merged(llama, plain, tmp_path / "nulls"), reference)
    (plain / CONFIG).write_text(json.dumps({key: config[key] for key in kept}))
    assert_same(merged(llama, plain, tmp_path / "few"), reference)


def refusal(base: Path, folder: Path, **expert):
    """The one fault that a plan finds."""
    with pytest.raises(CheckpointError) as error:
        make_plan(a_run(base, folder, folder.parent / "refused", **expert))
    [fault] = error.value.faults
    return fault


def test_an_adapter_on_a_4_bit_copy_of_the_base(layouts):
    base, made = layouts
    fault = refusal(base, made["unsloth"][1])
    assert fault.what.startswith(f"the adapter 'theirs' was trained on 'unsloth/tiny-bnb-4bit', the run's base is '{base}'")
    assert fault.fix.startswith("set `same_base: true` on the expert (`recall learn`: --same-base)")


@pytest.mark.parametrize("beside", [(), ("config.json",), ("config.json", CONFIG)])
def test_a_folder_of_checkpoints_alone_points_to_the_last(layouts, tmp_path, beside):
    """As after a training that was stopped: axolotl has written the configs by then."""
    base, made = layouts
    shutil.copytree(made["llama-factory"][1], tmp_path / "run", ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "*.json"))
    for step in (9, 10):
        shutil.copy(made["llama-factory"][1] / f"checkpoint-{step}" / CONFIG, tmp_path / "run" / f"checkpoint-{step}")
        shutil.copy(made["llama-factory"][1] / f"checkpoint-{step}" / WEIGHTS, tmp_path / "run" / f"checkpoint-{step}")
    for name in beside:
        shutil.copy(made["axolotl"][1] / name, tmp_path / "run")
    fault = refusal(base, tmp_path / "run")
    assert "its subfolder 'checkpoint-10' is an adapter" in fault.what
    last = tmp_path / "run" / "checkpoint-10"
    assert fault.fix == f"give the folder of the adapter itself: {last}"
    assert make_plan(a_run(base, last, tmp_path / "out"))


def test_pissa_of_llama_factory(llama, tmp_path):
    """`PissaConvertCallback` of its train/callbacks.py: the adapter changes the base; its converted form beside it does not."""
    folder, started = tmp_path / "run", tmp_path / "run" / "pissa_init"
    with quiet(), seeded(3):
        model = get_peft_model(load_model(llama), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=MODULES, init_lora_weights="pissa"))
        vars(model.peft_config["default"])["init_lora_weights"] = True
        model.save_pretrained(started)
        vars(model.peft_config["default"])["init_lora_weights"] = "pissa"
        for name, part in model.named_parameters():
            if "lora_" in name:
                part.add_(0.05 * torch.randn(part.shape))
        model.save_pretrained(folder)
        model.save_pretrained(folder / "pissa_converted", path_initial_model_for_weight_conversion=str(started))
        trained = {name: part.clone() for name, part in model.merge_and_unload().state_dict().items()}
    fault = refusal(llama, folder)
    assert fault.what == "the adapter was initialised with pissa, which changes the base's own weights"
    assert fault.fix == f"give the plain LoRA that LLaMA-Factory has made of it: {folder / 'pissa_converted'}"
    ours = merged(llama, folder / "pissa_converted", tmp_path / "out")
    for name in ours:
        torch.testing.assert_close(ours[name], trained[name], rtol=1e-4, atol=1e-5)


def test_an_adapter_that_learnt_the_rounding_of_its_base(layouts, tmp_path):
    """`write_merge_aware_metadata` of axolotl's integrations/kernels/merge_aware_callback.py."""
    base, made = layouts
    theirs = shutil.copytree(made["axolotl"][1], tmp_path / "theirs")
    add_keys(theirs, nvfp4_merge_aware={"scale_mode": "fresh", "pts_policy": "base_fused_max", "encoder": None, "start_step": 0})
    fault = refusal(base, theirs)
    assert "`nvfp4_merge_aware`" in fault.what and "axolotl merge-lora" in fault.fix


class TestOfTinkers:
    """Stacked experts are `plan_expert_ops` of tinker-cookbook's weights/_merge_utils.py; w1 and w3 share A, w2 shares B."""

    @pytest.fixture
    def experts(self, bases, tmp_path):
        """A base whose files hold every expert, Tinker's adapter, and what `build_lora_adapter` makes of it: one by one."""
        base, modules = bases("qwen3-moe"), ["q_proj", "v_proj", "lm_head"]
        one_by_one = lora(base, tmp_path / "one by one", r=4, lora_alpha=32, target_modules=modules)
        theirs = shutil.copytree(one_by_one, tmp_path / "theirs")
        parts = {key: part for key, part in load_tensors(theirs).items() if "base_layer" not in key}
        stacked, apart = {}, {}
        with seeded(5):
            for block in range(2):
                for matrix, word, (up, down) in [("w1", "gate_proj", (16, 32)), ("w2", "down_proj", (32, 16)), ("w3", "up_proj", (16, 32))]:
                    name = f"base_model.model.model.layers.{block}.mlp.experts"
                    a = torch.randn(4 if matrix == "w2" else 1, 4, down) / 9
                    b = torch.randn(1 if matrix == "w2" else 4, up, 4) / 9
                    stacked |= {f"{name}.{matrix}.lora_A.weight": a, f"{name}.{matrix}.lora_B.weight": b}
                    for expert in range(4):
                        apart[f"{name}.{expert}.{word}.lora_A.weight"] = a.expand(4, -1, -1)[expert].clone()
                        apart[f"{name}.{expert}.{word}.lora_B.weight"] = b.expand(4, -1, -1)[expert].clone()
        save_file(parts | apart, one_by_one / WEIGHTS)
        save_file({in_tinkers_words(key): part for key, part in (parts | stacked).items()}, theirs / WEIGHTS)
        add_keys(theirs, target_modules="all-linear")
        return base, theirs, one_by_one

    def test_experts_are_taken_apart(self, experts, tmp_path):
        base, theirs, one_by_one = experts
        ours = merged(base, theirs, tmp_path / "ours")
        assert_same(ours, merged(base, one_by_one, tmp_path / "reference"))
        before, stacked = load_tensors(base), load_tensors(theirs)
        for matrix, word in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            a, b = (stacked[f"base_model.model.model.layers.1.mlp.experts.{matrix}.lora_{each}.weight"] for each in "AB")
            delta = 32 / 4 * (b @ a)  # (E, out, in)
            for expert in range(4):
                name = f"model.layers.1.mlp.experts.{expert}.{word}.weight"
                torch.testing.assert_close(ours[name], before[name] + delta[expert], rtol=1e-5, atol=1e-6)

    def test_experts_in_one_tensor(self, bases, experts, tmp_path):
        base, theirs, one_by_one = experts
        fused = shutil.copytree(base, tmp_path / "fused")
        save_file(make_model("qwen3-moe").state_dict(), fused / "model.safetensors", metadata={"format": "pt"})
        ours, apart = merged(fused, theirs, tmp_path / "ours", same_base=True), merged(base, one_by_one, tmp_path / "reference")
        for block in range(2):
            name = f"model.layers.{block}.mlp.experts"
            for expert in range(4):
                gate, up, down = (apart.pop(f"{name}.{expert}.{word}.weight") for word in ("gate_proj", "up_proj", "down_proj"))
                torch.testing.assert_close(ours[f"{name}.gate_up_proj"][expert], torch.cat([gate, up]), rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(ours[f"{name}.down_proj"][expert], down, rtol=1e-5, atol=1e-6)
        assert_same({name: ours[name] for name in apart}, apart)

    def test_queries_keys_and_values_that_the_base_joins(self, base_of, tmp_path):
        """`_plan_split_qkv_op` of weights/_merge_qwen3_5.py."""
        base = base_of("qwen3_5_text")
        plain = lora(base, tmp_path / "plain", r=4, lora_alpha=32, target_modules=["in_proj_z", "out_proj"])
        theirs = shutil.copytree(plain, tmp_path / "theirs")
        reference = merged(base, plain, tmp_path / "reference")
        modules = [name.removesuffix("_qkv.weight") for name in reference if name.endswith("linear_attn.in_proj_qkv.weight")]
        parts = load_tensors(plain)
        with seeded(7):
            for module in modules:
                ups, downs = [torch.randn(rows, 4) / 9 for rows in (16, 16, 32)], [torch.randn(4, 32) / 9 for _ in range(3)]
                downs[0] = downs[0].bfloat16()
                for letter, up, down in zip("qkv", ups, downs, strict=True):
                    parts[f"base_model.model.{module}_{letter}.lora_A.weight"] = down
                    parts[f"base_model.model.{module}_{letter}.lora_B.weight"] = up
                delta = 32 / 4 * torch.cat([up @ down.float() for up, down in zip(ups, downs, strict=True)])
                reference[f"{module}_qkv.weight"] = reference[f"{module}_qkv.weight"] + delta
        save_file(parts, theirs / WEIGHTS)
        add_keys(theirs, target_modules="all-linear")
        ours = merged(base, theirs, tmp_path / "ours")
        assert modules and ours.keys() == reference.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], reference[name], rtol=1e-5, atol=1e-6)
        save_file({key: part for key, part in parts.items() if f"{modules[0]}_k" not in key}, theirs / WEIGHTS)
        fault = refusal(base, theirs)
        assert fault.what == f"the adapter's factors of '{modules[0]}_k' are of shapes () and (): not of rank 4"

    def test_experts_that_are_stored_otherwise_are_refused(self, base_of, experts):
        _, theirs, _ = experts
        with pytest.raises(CheckpointError) as error:
            open_adapter(theirs, open_checkpoint(base_of("gpt_oss")))
        faults = [fault for fault in error.value.faults if "mlp.experts" in fault.what]
        assert faults[0].what.startswith("the adapter changes 'model.layers.0.mlp.experts.gate_up_proj', which the base does not hold")
        assert len(faults) == 2 and all("weights.build_hf_model" in fault.fix for fault in faults)

    @pytest.mark.parametrize(
        ("change", "shapes"),
        [
            (lambda parts, e: parts.update({f"{e}.lora_B.weight": torch.ones(3, 16, 4)}), "(3, 16, 4) and (1, 4, 32)"),
            (lambda parts, e: parts.update({f"{e}.lora_B.weight": torch.ones(1, 16, 4)}), "(1, 16, 4) and (1, 4, 32)"),
            (lambda parts, e: parts.update({f"{e}.lora_B.weight": torch.ones(16, 4)}), "(16, 4) and (1, 4, 32)"),
            (lambda parts, e: parts.pop(f"{e}.lora_B.weight"), "() and (1, 4, 32)"),
            (
                lambda parts, e: parts.update({f"{e}.lora_A.weight": torch.ones(1, 2, 32), f"{e}.lora_B.weight": torch.ones(4, 16, 2)}),
                "(4, 16, 2) and (1, 2, 32)",
            ),
        ],
    )
    def test_stacks_of_other_shapes_are_refused(self, experts, change, shapes):
        base, theirs, _ = experts
        parts = load_tensors(theirs)
        change(parts, "base_model.model.model.layers.0.mlp.experts.w1")
        save_file(parts, theirs / WEIGHTS)
        what = f"factors of 'model.layers.0.mlp.experts.w1' are of shapes {shapes}: not of rank 4 and 4 experts"
        assert what in refusal(base, theirs).what

    def test_a_head_that_the_base_ties_is_refused(self, bases, tmp_path):
        """The cookbook adds it to the embedding, which Tinker has not trained."""
        base = bases("llama-tied")
        theirs = lora(base, tmp_path / "theirs", r=4, target_modules=["q_proj", "lm_head"])
        tinker(theirs, base)
        fault = refusal(base, theirs)
        assert fault.what.startswith("the adapter trains the head apart from the embedding") and "untie the base first" in fault.fix

    def test_what_it_splits_is_refused_by_name(self, layouts, tmp_path):
        base, made = layouts
        theirs = shutil.copytree(made["tinker"][1], tmp_path / "theirs")
        split = {"base_model.model.model.layers.0.mixer.x_proj.lora_A.weight": torch.ones(4, 32)}  # of Nemotron's `in_proj`
        save_file(load_tensors(theirs) | split, theirs / WEIGHTS)
        fault = refusal(base, theirs)
        assert fault.what == "the adapter changes 'model.layers.0.mixer.x_proj.weight', which the base does not have"
        assert "tinker-cookbook's `weights.build_hf_model`" in fault.fix

    def test_attention_of_gpt_oss(self, base_of, tmp_path):
        base = base_of("gpt_oss")
        plain = lora(base, tmp_path / "plain", r=4, target_modules=["q_proj", "o_proj"])
        theirs = shutil.copytree(plain, tmp_path / "theirs")
        save_file({key.replace(".self_attn.", ".attn."): part for key, part in load_tensors(plain).items()}, theirs / WEIGHTS)
        assert_same(merged(base, theirs, tmp_path / "ours"), merged(base, plain, tmp_path / "reference"))

    def test_a_head_under_both_names_is_refused(self, layouts, tmp_path):
        base, made = layouts
        theirs = shutil.copytree(made["tinker"][1], tmp_path / "theirs")
        head = {"base_model.model.lm_head.lora_A.weight": torch.ones(4, 32)}
        save_file(load_tensors(theirs) | head, theirs / WEIGHTS)
        assert refusal(base, theirs).what.startswith("the adapter holds both 'base_model.model.model.unembed_tokens.lora_A.weight' and")

    def test_an_adapter_that_names_no_base(self, layouts, tmp_path):
        base, made = layouts
        theirs = shutil.copytree(made["tinker"][1], tmp_path / "theirs")
        edit_json(theirs / CONFIG, base_model_name_or_path=None)
        assert refusal(base, theirs).what == "the adapter 'theirs' does not say which model it was trained on"
        assert make_plan(a_run(base, theirs, tmp_path / "out", same_base=True))


def test_a_workspace_learns_them_and_copies_what_it_needs(layouts, tmp_path):
    base, made = layouts
    data, folder = write_tasks(tmp_path), make_workspace(tmp_path / "ws", base, method="linear", stats_rank=0)
    for task, name in (("a", "llama-factory"), ("b", "axolotl, FSDP2"), ("c", "unsloth")):
        OPENED.clear()
        learned = teach(folder, data, task, expert=str(made[name][1]), same_base=name in ON_DISK)
        assert not [file for event, file in OPENED if event == "open" and file.endswith((".bin", ".pt", ".pth"))]
        copied = {file.name for file in (folder / learned.stage.expert.path).iterdir()} - {"config.json"}
        assert copied == {CONFIG, WEIGHTS, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", MARKER}
    assert [stage.task.name for stage in learned.state.lineage()] == ["a", "b", "c"]
    assert (folder / learned.stage.expert.path / "chat_template.jinja").read_text() == TEMPLATE
