"""A scenario, typed: the file that `recall bench` reads. It is strict like a run, and checked as a whole before any work starts."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from recall_merge.files.row_sources import LearntRows, ScoredRows, Template
from recall_merge.merging.run import LayerScale, Prune, Weights
from recall_merge.runtime.device import DeviceName
from recall_merge.runtime.errors import Faults, RunError, did_you_mean
from recall_merge.runtime.paths import exists
from recall_merge.runtime.sections import Section, assign, parse, read_mapping
from recall_merge.training.settings import TrainSettings

Kind = Literal["multi-model", "sequential", "single-model"]
KINDS = {
    "multi-model": "Experts trained on their own from the base, merged in one shot after each task; a single expert is taken as it is.",
    "sequential": "After each task the last merge and the newest expert are merged; the first expert is taken as it is.",
    "single-model": "The base and one expert: each task is a trial of its own, and all other tasks count as unseen.",
}
ARROW = " > "  # between the tasks of an order
BASELINES = {
    "experts": "each task by the expert trained on it alone: as many models as tasks, an upper reference",
    "sequential": "fine-tuning one task after another, no merging",
    "ewc": "the same, with a penalty that holds what earlier tasks need: elastic weight consolidation",
    "o_lora": "a new adapter for each task, held at right angles to those of earlier ones: O-LoRA",
    "protected": "the same, but how far a new task moves the answers of earlier ones is held down, by their input statistics",
    "replay": "the same, with a share of the earlier tasks' rows mixed in: not data-free, an upper reference",
    "joint": "one training on the rows of all tasks together: not data-free, an upper bound",
}


class TestRows(Section):
    """A task that models are scored on."""

    name: str = Field(min_length=1)
    test: ScoredRows = Field(description="rows to score on, looked for under `data`: a path, or `{path: .., columns: ..}` as in a run")
    metric: str | None = Field(default=None, description="acc for rows with choices, exact_match for rows without, by default")
    kind: str = Field(default="", description="a word for the tables: sentiment, translation, ...")
    test_rows: int | None = Field(default=None, ge=1, description="of this task, in place of `rows.test`")


class TaskRows(TestRows):
    """A task that experts are trained on as well."""

    train: LearntRows = Field(description="rows to train on, likewise")
    train_rows: int | None = Field(default=None, ge=1, description="of this task, in place of `rows.train`")


class RowLimits(Section):
    """The first rows of each file; all of them by default."""

    train: int | None = Field(default=None, ge=1)
    test: int | None = Field(default=None, ge=1)


class DrawnOrders(Section):
    """`count` different orders of the tasks: the listed one, and others drawn by the seed."""

    count: int = Field(ge=1)
    seed: int = 0


class MethodEntry(Section):
    """A merge method with options as in a run, or a baseline."""

    name: str = Field(default="", description="in the tables; the method's own by default")
    method: str = Field(description="one of `recall methods`, or a baseline: " + ", ".join(BASELINES))
    options: dict[str, Any] = Field(default_factory=dict, description="of the method, or of the baseline")
    weights: Weights = Field(default="uniform", description="as in a run")
    scale_by_layer: LayerScale | None = Field(default=None, description="as in a run")
    prune: Prune | None = Field(default=None, description="as in a run")
    training: dict[str, Any] = Field(default_factory=dict, description="settings of training that differ for this baseline")

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, entry: Any) -> Any:
        entry = {"method": entry} if isinstance(entry, str) else entry
        return {**entry, "name": entry.get("name") or entry["method"]} if isinstance(entry, Mapping) and "method" in entry else entry

    @property
    def is_baseline(self) -> bool:
        return self.method in BASELINES


class EwcOptions(Section):
    strength: float = Field(default=1e5, ge=0, allow_inf_nan=False, description="lambda: how much a change of what matters costs")
    rows: int = Field(default=64, ge=1, description="of each task, to find what matters to it")


class OLoraOptions(Section):
    strength: float = Field(default=0.5, ge=0, allow_inf_nan=False, description="lambda: how much it costs that rows of A are alike")


class ReplayOptions(Section):
    share: float = Field(default=0.05, gt=0, le=1, description="of each earlier task's rows, drawn once by the seed")


class ProtectedOptions(Section):
    start: Literal["adapter", "last", "base"] = Field(
        default="last",
        description="what a task is trained from: the adapter so far; a new one on the model so far; or one on the base, merged by `merge`",
    )
    merge: str = Field(default="aligned", description="how experts that all start from the base are merged")


BaselineOptions = EwcOptions | OLoraOptions | ReplayOptions | ProtectedOptions
BASELINE_OPTIONS: dict[str, type[BaselineOptions]] = {
    "ewc": EwcOptions,
    "o_lora": OLoraOptions,
    "protected": ProtectedOptions,
    "replay": ReplayOptions,
}


class Chain(Section):
    """The scenario `sequential`: after each task the newest expert and the last merge become the next merge."""

    start: Literal["base", "merge"] = Field(default="base", description="what each task's expert is fine-tuned from")


class Scoring(Section):
    batch_size: int = Field(default=8, ge=1, description="prompts at a time; changes the time only")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="of the models while they are scored")
    stages: Literal["all", "learnt", "last"] = Field(
        default="all",
        description="all tasks learnt so far after every stage; or the newest one alone, and all at the end; or at the end only",
    )
    unlearnt: bool = Field(default=False, description="score tasks before they were learnt too: forward transfer")


class Scenario(Section):
    """One bench."""

    model: str = Field(min_length=1, description="the base: a folder, or a hub name with optional @revision")
    data: Path = Field(default=Path(), description="the folder under which the files of rows lie")
    tasks: list[TaskRows] = Field(min_length=1)
    unseen: list[TestRows] = Field(default_factory=list, description="tasks that nothing is trained on")
    rows: RowLimits = Field(default_factory=RowLimits)
    kinds: list[Kind] = Field(default_factory=lambda: ["multi-model"], min_length=1)
    orders: DrawnOrders | list[list[str]] = Field(default_factory=lambda: DrawnOrders(count=3))
    seeds: list[int] = Field(default_factory=lambda: [0], min_length=1)
    trials: Literal["crossed", "paired"] = Field(
        default="crossed", description="every seed with every order; or the first seed with the first order, the second with the second, .."
    )
    methods: list[MethodEntry] = Field(min_length=1, description="worked through as listed")
    training: TrainSettings = Field(default_factory=TrainSettings)
    samples: dict[str, Any] = Field(default_factory=dict, description="as in a run, without a path: the rows are the newest task's")
    sequential: Chain = Field(default_factory=Chain)
    scoring: Scoring = Field(default_factory=Scoring)
    template: Template = Field(
        default=True,
        description="apply the base's chat template where it has one, in training, samples and scoring; or that of a Jinja file",
    )
    workers: int = Field(default=1, ge=1, description="processes, each of one thread")
    device: DeviceName = Field(default="auto", description="where models are trained, compared and scored; as in a run")
    out: Path | None = Field(default=None, description="folder of the jobs and the results")

    @field_validator("methods")
    @classmethod
    def _names_once(cls, methods: list[MethodEntry]) -> list[MethodEntry]:
        names = [entry.name for entry in methods]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"taken twice: {', '.join(twice)}; give one of the two another `name`")
        return methods

    @model_validator(mode="after")
    def _tasks_and_orders(self) -> Scenario:
        names = [task.name for task in (*self.tasks, *self.unseen)]
        if wrong := sorted({name for name in names if names.count(name) > 1 or name == "base" or ARROW in name}):
            raise ValueError(f"names of tasks are taken twice, or not allowed: {', '.join(wrong)}")
        learnt = sorted(task.name for task in self.tasks)
        if isinstance(self.orders, DrawnOrders):
            if self.orders.count > math.factorial(len(learnt)):
                raise ValueError(f"{len(learnt)} tasks have only {math.factorial(len(learnt))} orders")
        elif odd := [order for order in self.orders if sorted(order) != learnt]:
            raise ValueError(f"an order names every task once; this does not: {odd[0]}")
        elif not self.orders:
            raise ValueError("`orders` is empty")
        if self.trials == "paired" and len(self.seeds) != len(self.task_orders):
            raise ValueError(f"{len(self.seeds)} seeds and {len(self.task_orders)} orders cannot be paired; give as many of each")
        if "template" in self.training.model_fields_set or "template" in self.samples:
            raise ValueError("`template` is given once, for the whole scenario")
        if "seed" in self.training.model_fields_set:
            raise ValueError("`seeds` are given once, for the whole scenario")
        return self

    @property
    def task_orders(self) -> list[tuple[str, ...]]:
        """The orders of the tasks, each different."""
        if not isinstance(self.orders, DrawnOrders):
            return list(dict.fromkeys(map(tuple, self.orders)))
        listed = tuple(task.name for task in self.tasks)
        orders, draws = {listed: None}, random.Random(self.orders.seed)
        while len(orders) < self.orders.count:
            orders[tuple(draws.sample(listed, len(listed)))] = None
        return list(orders)

    def settings(self, entry: MethodEntry | None, seed: int) -> TrainSettings:
        """How a model of this entry is trained; None for the experts that all merges share. Raises RunError if its settings do not fit."""
        own, where = (entry.training, f"training of {entry.name}") if entry is not None else ({}, "training")
        shared = self.training.model_dump(exclude_unset=True)
        return parse(TrainSettings, {**shared, **own, "seed": seed, "template": self.template}, where=where)


def narrowed(scenario: Scenario, names: Sequence[str]) -> Scenario:
    """A scenario with these of its methods alone; with all of them if there are none. Raises RunError for names that it does not have."""
    known, faults = [entry.name for entry in scenario.methods], Faults()
    for name in (name for name in names if name not in known):
        faults.add(f"the scenario has no method '{name}'", where="--only", fix=did_you_mean(name, known))
    faults.raise_any(RunError)
    return scenario.model_copy(update={"methods": [entry for entry in scenario.methods if not names or entry.name in names]})


def load_scenario(path: Path, overrides: Mapping[str, Any] | None = None) -> Scenario:
    """Read a scenario from YAML. `model`, `data` and `out` are relative to its folder, or else to the current one. `overrides`, the dotted
    keys of `--set`, win over the file, and their paths are relative to the current folder. Raises RunError with every fault of the file.
    """
    content = read_mapping(path, "scenario", "docs/bench.md")
    for key in ("model", "data", "out", "template"):
        if isinstance(content.get(key), str) and (key == "out" or exists(path.parent / content[key])):
            content[key] = str(path.parent / content[key])
    for key, value in (overrides or {}).items():
        assign(content, key, value)
    return parse(Scenario, content, where=str(path))
