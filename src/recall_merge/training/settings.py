"""How an expert is trained: our own settings, and any other argument of trl's."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from recall_merge.files.row_sources import Template
from recall_merge.models.load import hushed
from recall_merge.models.tokens import Turns
from recall_merge.runtime.device import find_device, prefers_bfloat16
from recall_merge.runtime.errors import Faults, MissingExtra, RunError, did_you_mean
from recall_merge.runtime.sections import NonNegative, Positive, Section

if TYPE_CHECKING:
    import torch

ADAPTER_RATE, FULL_RATE = 8e-4, 2e-5
ADAPTER_ONLY = ("rank", "alpha", "dropout")
WHOLE = ("full", "osf")  # kinds whose expert is a whole model
DEFAULTS: dict[str, Any] = {
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
    "train_sampling_strategy": "group_by_length",
    "logging_steps": 1,
    "logging_nan_inf_filter": False,  # it would record such a loss as another
    "save_strategy": "steps",
    "save_steps": 0.1,
    "save_total_limit": 2,  # the older one is used if training stops while the newer is written
    "gradient_checkpointing": False,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
"""Where we differ from trl's own defaults. The `arguments` of the settings win."""
SETTING_OF = {
    "learning_rate": "learning_rate",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "max_length": "max_length",
    "seed": "seed",
}
FIXED = {
    "output_dir": "checkpoints lie beside the expert until it is finished",
    "resume_from_checkpoint": "training always resumes from its own checkpoints",
    "model_init_kwargs": "recall loads the base",
    "chat_template_path": "`template: FILE` gives a chat template, for scoring too",
    "assistant_only_loss": "the loss is on the completion; `turns: all` takes all turns of the assistant",
    "dataset_text_field": "recall reads the rows",
    "dataset_kwargs": "recall reads the rows",
    "eos_token": "a turn ends as the base ends it",
    "pad_token": "the model never sees padding",
}
OPEN = {
    *("max_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "gradient_accumulation_steps", "average_tokens_across_devices"),
    *("label_smoothing_factor", "neftune_noise_alpha", "loss_type", "router_aux_loss_coef", "completion_only_loss", "truncation_mode"),
    *("packing", "packing_strategy", "padding_free", "pad_to_multiple_of", "shuffle_dataset", "train_sampling_strategy"),
    *("bf16", "fp16", "tf32", "use_cpu", "use_cache", "full_determinism", "data_seed", "auto_find_batch_size", "torch_empty_cache_steps"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing", "activation_checkpointing_kwargs"),
    *("activation_offloading", "dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
    *("dataloader_persistent_workers", "dataset_num_proc", "logging_strategy", "logging_steps", "logging_first_step"),
    *("logging_nan_inf_filter", "disable_tqdm", "save_strategy", "save_steps", "save_total_limit"),
}
"""Arguments that may stand in any file: they change what is learnt and how fast. Others may upload, report, load files or run code, so a
person allows each by name where they give the command, `--allow-argument NAME`."""


RowsOfA = Literal["free", "isolated", "mixed"]


class Protect(Section):
    """How earlier tasks are protected while a new one is learnt: their answers may move little, by their input statistics."""

    strength: Literal["auto"] | NonNegative = Field(
        default=1e4, description="what it costs that answers move; `auto` follows how far they have moved; 0: no protection"
    )
    tolerance: Positive = Field(
        default=0.003, description="of `auto`: how far answers of earlier tasks may move, as a share of their size (root mean square)"
    )
    rows_of_a: RowsOfA | None = Field(
        default=None,
        description="where the A of a new adapter begins: free, anywhere; isolated, in directions that the new task's inputs have and "
        "earlier ones' lack; mixed, half there and half where both lie. Isolated by default",
    )
    base: NonNegative = Field(
        default=1.0, description="how much the base's own answers count beside an earlier task's, on text that it writes itself"
    )
    statistics: dict[str, str] = Field(
        default_factory=dict, description="by task, folders of input statistics of further experts on the same base"
    )

    @property
    def is_on(self) -> bool:
        """Whether anything can be protected."""
        return self.strength != 0

    @property
    def asks_for_rows(self) -> bool:
        """Whether it is said where a new adapter's A begins, and not at random: only a new adapter can."""
        return self.rows_of_a not in {None, "free"}

    @property
    def wants_base(self) -> bool:
        """Whether the base is protected too, on text of its own."""
        return self.is_on and self.base > 0

    @field_validator("statistics")
    @classmethod
    def _tasks_alone(cls, statistics: dict[str, str]) -> dict[str, str]:
        if "base" in statistics:
            raise ValueError("`base` is no task: its weight is given by `protect.base`, and its statistics are made")
        return statistics


class TrainSettings(Section):
    """How an expert is trained."""

    kind: Literal["lora", "dora", "full", "osf"] = Field(
        default="lora",
        description="a low-rank adapter; one with magnitudes; all weights; or, of linear maps, what lies off the larger half of their "
        "singular directions, which stay as they are (PEFT's OSF)",
    )
    rank: int = Field(default=16, ge=1, description="rank of an adapter")
    alpha: Positive = Field(default=32, description="an adapter's delta is (alpha / rank) B A")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="on an adapter's input, while training")
    targets: str | list[str] = Field(
        default="all-linear", description="modules with an adapter, as PEFT names them; all-linear: all but the head"
    )
    epochs: Positive = Field(default=2, description="passes over the rows")
    learning_rate: Positive | None = Field(
        default=None, description=f"peak learning rate; {ADAPTER_RATE:g} for adapters, {FULL_RATE:g} for whole models"
    )
    batch_size: int = Field(default=8, ge=1, description="rows per step and device")
    max_length: Annotated[int, Field(ge=2)] | None = Field(
        default=None, description="cut longer rows to this many tokens; by default none are cut"
    )
    template: Template = Field(
        default=True, description="apply the base's chat template where it has one; or a Jinja file, which the expert gets"
    )
    turns: Turns = Field(default="last", description="of a conversation: its last answer is learnt, or all turns of the assistant")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of the base while training, and of a fully trained expert"
    )
    protect: Protect | None = Field(default=None, description="of earlier tasks, whose input statistics are at hand")
    seed: int = 0
    arguments: dict[str, Any] = Field(default_factory=dict, description="other arguments of trl's SFTConfig")

    @property
    def facts(self) -> dict[str, Any]:
        """All settings as they are recorded, and hashed."""
        return self.model_dump(mode="json", exclude={"protect"} if self.protect is None else None)

    @property
    def encoding(self) -> dict[str, Any]:
        """Arguments of `encode_rows`."""
        label_prompt = self.arguments.get("completion_only_loss") is False
        return {"template": self.template, "max_length": self.max_length, "turns": self.turns, "label_prompt": label_prompt}

    @model_validator(mode="after")
    def _settings_fit_the_kind(self) -> TrainSettings:
        adapters_only = [*ADAPTER_ONLY, *(["targets"] if self.kind == "full" else [])]
        changed = [name for name in adapters_only if getattr(self, name) != type(self).model_fields[name].default]
        if self.kind in WHOLE and changed:
            raise ValueError(f"{', '.join(changed)}: of adapters only, and a whole model is to be trained")
        if self.kind == "osf" and self.protect is not None:
            raise ValueError("`protect` goes with the kinds lora, dora and full")
        if self.kind == "full" and self.protect is not None and self.protect.asks_for_rows:
            raise ValueError("`protect.rows_of_a` is of adapters only, and a whole model is to be trained")
        return self


def training_device(name: str | None = None) -> torch.device:
    """The device that a name stands for, as `find_device`. Raises RunError for another accelerator than the first: trl takes that one."""
    device = find_device(name)
    if device.index:
        fix = f"show it that one alone, `CUDA_VISIBLE_DEVICES={device.index}` where it is of CUDA, and leave out the number"
        raise RunError(f"training runs on the first accelerator, not on {device}", where="device", fix=fix)
    return device


def arguments_on(device: torch.device) -> dict[str, Any]:
    """What trl is told of a device. The `arguments` of the settings win over these too.

    An accelerator that is fast in bfloat16 multiplies in it, with weights and sums in float32.
    """
    import torch

    if device.type != "cpu":
        return {"bf16": prefers_bfloat16(device)}
    return {"use_cpu": True} if torch.accelerator.is_available() else {}


def check_arguments(settings: TrainSettings, allowed: Collection[str] = ()) -> dict[str, Any]:
    """The arguments for trl's SFTConfig. `allowed`: names that a person allows besides those that are open.

    Raises RunError with all names that trl does not know, that cannot be given as `arguments`, or that nobody has allowed.
    """
    try:
        with hushed():
            from trl.trainer.sft_config import SFTConfig
    except ModuleNotFoundError as error:
        raise MissingExtra("train", "training") from error
    faults = Faults()
    names = [field.name for field in fields(SFTConfig) if field.init]
    for name in settings.arguments:
        if name in SETTING_OF:
            faults.add(f"'{name}' is a setting of its own, not one of `arguments`", fix=f"give it as `{SETTING_OF[name]}`")
        elif name in FIXED:
            faults.add(f"'{name}' cannot be changed: {FIXED[name]}", fix="leave it out")
        elif name not in names:
            near = did_you_mean(name, names).partition(" known:")[0]  # more than a hundred are known: only a near one is worth showing
            fix = near if near.startswith("did") else "see trl's documentation of SFTConfig"
            faults.add(f"trl's SFTConfig has no argument '{name}'", fix=fix)
        elif name not in OPEN and name not in allowed:
            what = f"the argument '{name}' may do more than train: send data away, load files or run code"
            faults.add(what, where="training.arguments", fix=f"take it out; or, if you want it, add --allow-argument {name}")
    if settings.protect is not None and settings.arguments.get("fp16"):  # it scales the loss, beside which the penalty would be nothing
        faults.add("earlier tasks cannot be protected in float16", where="training.arguments", fix="give `bf16: true` in place of `fp16`")
    faults.raise_any(RunError)
    packing = settings.arguments.get("packing", False)
    if packing and settings.max_length is None:
        raise RunError("packing needs the length of a pack", fix="give `max_length`")
    ours = {trl_name: getattr(settings, name) for trl_name, name in SETTING_OF.items()}
    ours["learning_rate"] = settings.learning_rate or (FULL_RATE if settings.kind in WHOLE else ADAPTER_RATE)
    ours["max_length"] = settings.max_length if packing else None  # otherwise rows are cut before
    return DEFAULTS | ours | settings.arguments
