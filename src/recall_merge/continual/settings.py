"""How the stages of a workspace are done, typed: a run without its models and data, plus training and scoring."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from recall_merge.files.companions import chat_template
from recall_merge.files.row_sources import RowSource, Template
from recall_merge.merging.rules import Rules, make_rules, method_named
from recall_merge.merging.run import ByLayer, MergeRun, Ramp
from recall_merge.runtime.device import DeviceName
from recall_merge.runtime.errors import Faults, RunError
from recall_merge.runtime.sections import Section, assign, parse
from recall_merge.training.settings import TrainSettings

OWN = (
    "base",
    "experts",
    "samples.path",
    "samples.split",
    "samples.config",
    "samples.columns",
    "samples.system",
    "samples.template",
    "out.path",
    "out.overwrite",
    "training.template",
)
"""Keys that the workspace itself fills in; `template` is given once, for training, samples and scoring."""


class Scoring(Section):
    """How models are scored."""

    batch_size: int = Field(default=8, ge=1, description="prompts at a time; changes the time only")
    limit: int | None = Field(default=None, ge=1, description="only the first rows of each task")
    device: DeviceName | None = Field(default=None, description="by default the `device` of all other work")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="of the models; float32 on the processor, and on an accelerator their own, by default"
    )
    words: bool = Field(default=False, description="keep the models' answers too; by default only whether they are right")


class Settings(MergeRun):
    """How a stage is done: the keys of a run, and these."""

    method: str = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default="recall", description="one of `recall methods`, for strategies that merge"
    )
    strategy: Literal["newest", "one_shot", "sequential"] = Field(
        default="newest",
        description="keep the newest expert alone, each trained from the last one; or merge all experts anew each time; or the merge "
        "before and the newest. one_shot by default where a `method` is given",
    )
    keep_samples: bool = Field(default=False, description="keep the typical samples themselves too; by default only their row numbers")
    stats_rank: int = Field(default=24, ge=0, description="directions that an expert's statistics keep of each input; 0 for no statistics")
    training: TrainSettings = Field(default_factory=TrainSettings)
    scoring: Scoring = Field(default_factory=Scoring)
    template: Template = Field(
        default=True,
        description="apply the base's chat template where it has one, in training, samples and scoring; or that of a Jinja file",
    )

    def stored(self) -> dict[str, Any]:
        """The settings as the workspace keeps them: all of them, so that another version's defaults do not change them."""
        data = self.model_dump(mode="json")
        for key in OWN:
            section, _, name = key.rpartition(".")
            del (data[section] if section else data)[name]
        return data

    def run(self, *, base: str, experts: list[dict[str, Any]], rows: RowSource | None, out: str) -> MergeRun:
        """The run of one merge. Raises RunError with everything that does not fit."""
        data = self.model_dump(mode="json", include=set(MergeRun.model_fields))
        samples = None
        if rows is not None:
            described = rows.model_dump(include=set(RowSource.model_fields), exclude_none=True)
            samples = {**data["samples"], "template": self.template, **described}
        if isinstance(self.template, str) and data["out"]["chat_template"] is None:  # experts that are trained with it have it
            speakers = (entry["name"] for entry in reversed(experts) if chat_template(Path(entry["path"])) == self.template)
            data["out"]["chat_template"] = next(speakers, None)
        data |= {"base": base, "experts": experts, "samples": samples, "out": {**data["out"], "path": out, "overwrite": True}}
        return parse(MergeRun, data, where="settings of the workspace")

    def for_experts(self, experts: int) -> Settings:
        """The settings of a merge of this many experts: a single one is taken as it is where the method merges two or more."""
        method = method_named(self.method)
        if experts > 1 or method is None or method.experts[0] <= experts:
            return self
        return self._plain

    def for_stage(self, experts: int) -> Settings:
        """The settings of a stage's merge of this many experts."""
        if self.strategy != "newest":
            return self.for_experts(experts)
        return self._plain

    @property
    def _plain(self) -> Settings:
        """The settings with which a single expert is taken as it is."""
        return self.model_copy(update={"method": "linear", "options": {}, "weights": "uniform", "prune": None, "scale_by_layer": None})

    @property
    def scoring_device(self) -> str:
        return self.scoring.device or self.device

    def training_settings(self) -> TrainSettings:
        return self.training.model_copy(update={"template": self.template})


def first_settings(sets: Mapping[str, Any]) -> Settings:
    """The settings of a new workspace. Where each task is learnt on top of the last, earlier ones are protected unless `sets` says
    otherwise. Raises RunError with every fault.
    """
    settings = make_settings({}, sets)
    training = sets.get("training", {})
    is_said = "protect" in training or any(key.startswith("training.protect") for key in sets)
    if is_said or settings.strategy != "newest" or settings.training.kind == "osf":
        return settings
    return make_settings({}, {**sets, "training.protect": {}})


def strategy_of(stored: Mapping[str, Any], overrides: Mapping[str, Any]) -> Any:
    """The strategy of a stage, unchecked: the one that is given; one that merges where a merge method is given; or the workspace's."""
    kept = stored.get("strategy", "newest")
    return overrides.get("strategy", "one_shot" if "method" in overrides and kept == "newest" else kept)


def make_settings(stored: Mapping[str, Any], overrides: Mapping[str, Any], *, where: str = "--set") -> Settings:
    """Settings from those of a workspace, with some overridden by dotted keys. Another method comes with its own options' defaults, and
    with a strategy that merges. Raises RunError with every fault.
    """
    faults, data = Faults(), deepcopy(dict(stored)) | {"strategy": strategy_of(stored, overrides)}
    if overrides.get("method", data.get("method")) != data.get("method"):
        data.pop("options", None)
    for key, value in overrides.items():
        if key in OWN or key.partition(".")[0] in {"base", "experts"}:
            fix = "give `template`, for training, samples and scoring at once" if key.endswith("template") else "leave it out"
            faults.add(f"'{key}' is filled in by the workspace", where=where, fix=fix)
        else:
            with faults.collect():
                assign(data, key, value)
    with faults.collect():
        samples = data.setdefault("samples", {})
        filled = {"samples": {**samples, "path": "rows"}} if isinstance(samples, dict) else {}
        settings = parse(Settings, {**data, "base": "base", "experts": [{"name": "newest", "path": "newest"}], **filled}, where=where)
    faults.raise_any(RunError)
    return settings


def check_overrides(settings: Settings, stored: Mapping[str, Any]) -> None:
    """Check that a stage is scored as the others are, since their scores stand in one table. Raises RunError with all that differs."""
    whole, faults = make_settings(stored, {}), Faults()
    for name in ("template", "scoring.limit", "scoring.dtype"):
        own, others = map(attrgetter(name), (settings, whole))
        if own != others:
            what = f"'{name}' is {others} in this workspace and cannot be {own} for one stage: all stages' scores stand in one table"
            faults.add(what, where="--set", fix="leave it out; `recall init` sets it for all stages")
    faults.raise_any(RunError)


def check_method(settings: Settings, experts: int | None = None) -> Rules:
    """Check method, options and weights, for a number of experts, by default one that fits. Raises RunError with every fault."""
    weights: Any = settings.weights
    if isinstance(weights, ByLayer | Ramp):
        weights = weights.by_layer if isinstance(weights, ByLayer) else weights.ramp
    row = weights[0] if isinstance(weights, list) and weights and isinstance(weights[0], list) else weights
    if experts is None:
        method = method_named(settings.method)
        experts = len(row) if isinstance(row, list | dict) else method.experts[0] if method else 1
    names = list(row) if isinstance(row, dict) and len(row) == experts else [str(number) for number in range(experts)]
    entries = [{"name": name, "path": name} for name in names]
    return make_rules(settings.run(base="base", experts=entries, rows=RowSource.of("rows"), out="out"))
