"""How an expert is trained: our own settings, and any argument of trl's beside them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from recall_merge.models.load import quiet
from recall_merge.runtime.errors import Faults, MissingExtra, RunError, did_you_mean
from recall_merge.runtime.sections import Positive, Section

ADAPTER_RATE, FULL_RATE = 8e-4, 2e-5
ADAPTER_ONLY = ("rank", "alpha", "dropout", "targets")
DEFAULTS: dict[str, Any] = {
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
    "train_sampling_strategy": "group_by_length",
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 0.1,
    "save_total_limit": 2,  # the older one serves where a stop falls into the writing of the newer
    "gradient_checkpointing": False,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
"""Arguments of trl's that differ from its own defaults; a setting's `arguments` win over them."""
SETTINGS_OF = {
    "learning_rate": "learning_rate",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "max_length": "max_length",
    "seed": "seed",
}
NOT_OPEN = {
    "output_dir": "checkpoints lie beside the expert until it is finished",
    "resume_from_checkpoint": "training goes on from its own checkpoints without being told",
    "model_init_kwargs": "the base is loaded by recall",
    "chat_template_path": "rows are rendered with the base's own template, as for scoring",
    "assistant_only_loss": "the loss is on the completion",
    "dataset_text_field": "rows are read by recall",
    "dataset_kwargs": "rows are read by recall",
    "eos_token": "the end of a turn is the base's own",
    "pad_token": "padding is never seen by the model",
}


class TrainSettings(Section):
    """How an expert is trained."""

    kind: Literal["lora", "dora", "full"] = Field(default="lora", description="a low-rank adapter, one with magnitudes, or all weights")
    rank: int = Field(default=16, ge=1, description="of an adapter")
    alpha: Positive = Field(default=32, description="an adapter's delta is (alpha / rank) B A")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="on an adapter's input, while training")
    targets: str | list[str] = Field(
        default="all-linear", description="modules with an adapter, as PEFT names them; all-linear: but the head"
    )
    epochs: Positive = Field(default=2, description="passes over the rows")
    learning_rate: Positive | None = Field(
        default=None, description=f"at its peak; {ADAPTER_RATE:g} for adapters, {FULL_RATE:g} for all weights"
    )
    batch_size: int = Field(default=8, ge=1, description="rows a step, on each device")
    max_length: Annotated[int, Field(ge=2)] | None = Field(
        default=None, description="tokens at which longer rows are cut; none are cut by default"
    )
    template: bool = Field(default=True, description="apply the base's chat template where it has one")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of the base while training, and of a fully trained expert"
    )
    seed: int = 0
    arguments: dict[str, Any] = Field(default_factory=dict, description="any argument of trl's SFTConfig that no other setting covers")

    @property
    def encoding(self) -> dict[str, Any]:
        """Arguments of `encode_rows`."""
        return {
            "template": self.template,
            "max_length": self.max_length,
            "label_prompt": self.arguments.get("completion_only_loss") is False,
        }

    @model_validator(mode="after")
    def _adapter_settings_need_an_adapter(self) -> TrainSettings:
        given = [name for name in ADAPTER_ONLY if getattr(self, name) != type(self).model_fields[name].default]
        if self.kind == "full" and given:
            raise ValueError(f"{', '.join(given)}: of adapters only, and all weights are to be trained")
        return self


def check_arguments(settings: TrainSettings) -> dict[str, Any]:
    """The arguments for trl's SFTConfig.

    Raises:
        MissingExtra: without trl.
        RunError: with all names that trl does not know, or that are not to be given this way.
    """
    try:
        with hushed():
            from trl.trainer.sft_config import SFTConfig
    except ImportError as error:
        raise MissingExtra("train", "training") from error
    faults = Faults()
    known = [field.name for field in fields(SFTConfig) if field.init]
    for name in settings.arguments:
        if name in SETTINGS_OF:
            faults.add(f"'{name}' is not to be given under `arguments`", fix=f"give it as `{SETTINGS_OF[name]}`")
        elif name in NOT_OPEN:
            faults.add(f"'{name}' cannot be changed: {NOT_OPEN[name]}", fix="leave it out")
        elif name not in known:
            faults.add(f"trl's SFTConfig has no argument '{name}'", fix=_suggest(name, known))
    faults.raise_any(RunError)
    rate = settings.learning_rate or (FULL_RATE if settings.kind == "full" else ADAPTER_RATE)
    given = {"learning_rate": rate, "num_train_epochs": settings.epochs, "per_device_train_batch_size": settings.batch_size}
    packing = settings.arguments.get("packing", False)
    if packing and settings.max_length is None:
        raise RunError("packing needs to know how long a pack is", fix="give `max_length`")
    return DEFAULTS | given | {"seed": settings.seed, "max_length": settings.max_length if packing else None} | settings.arguments


def _suggest(name: str, known: Sequence[str]) -> str:
    """A hundred and more names are known: only a near one is worth showing."""
    near = did_you_mean(name, known).partition(" known:")[0]
    return near if near.startswith("did") else "see trl's documentation of SFTConfig"


@contextmanager
def hushed() -> Iterator[None]:
    """Keep other packages' bars, hints and notes of what they will change one day off the terminal."""
    with quiet(), warnings.catch_warnings():
        for kind in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", kind)
        yield
