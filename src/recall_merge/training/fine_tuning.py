"""Fine-tune a base on rows with trl: a PEFT adapter, or all weights. The result is an expert."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recall_merge.files.adapter import CONFIG, is_adapter
from recall_merge.files.checkpoint import open_checkpoint, read_json
from recall_merge.files.hashing import FileStates, hash_file
from recall_merge.files.output import OutputFolder
from recall_merge.files.record import verify_files, versions, write_record
from recall_merge.files.rows import Row
from recall_merge.files.statistics import WEIGHTS
from recall_merge.models.load import build_model, hushed, load_tokenizer, load_trainable
from recall_merge.models.tokens import EncodedRow, encode_rows, template_of
from recall_merge.runtime.device import hardware
from recall_merge.runtime.errors import Faults, OutputError, ResultError, RunError
from recall_merge.runtime.progress import Progress
from recall_merge.training import checkpoints
from recall_merge.training.earlier import Earlier
from recall_merge.training.settings import WHOLE, RowsOfA, TrainSettings, arguments_on, check_arguments, training_device

if TYPE_CHECKING:
    import torch

    from recall_merge.training.protection import Protection
    from recall_merge.training.trl_private import Trainer

TRAIN_LOCK = threading.Lock()  # trainings of one process take turns: they draw from one random generator
SETS = ("target_modules", "exclude_modules", "modules_to_save")  # keys of an adapter's config


@dataclass(frozen=True)
class TrainResult:
    """An expert, and how its training went."""

    folder: Path
    steps: int
    losses: tuple[float, ...]
    """Of every logged step, also of those before a restart."""
    tokens: int
    """In one pass over the rows."""
    seconds: float
    """Of this call; 0 for an expert that is used again."""
    resumed_at: int = 0
    """The step that an earlier, stopped training had reached."""
    reused: bool = False
    """There was an intact expert of the same base, rows and settings."""


def train(
    base: Path,
    rows: Sequence[Row],
    out: Path,
    settings: TrainSettings | None = None,
    *,
    init_from: Path | None = None,
    device: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    callbacks: Sequence[Any] = (),
    allowed: Collection[str] = (),
    earlier: Earlier | None = None,
) -> TrainResult:
    """Train an expert and write it to `out`, whole or not at all.

    The same call again continues a training that was stopped, from its last checkpoint. An expert at `out` is used again if base, rows,
    settings, device and every byte of it are unchanged. On one machine's processor, with one number of threads, the same call gives the
    same expert, whether it was stopped in between or not.

    Args:
        base: a model folder; recorded in an adapter's `base_model_name_or_path` as given.
        init_from: an expert of the same kind to continue from: fine-tuning one task after another.
        device: as `training_device` takes it.
        overwrite: replace another expert at `out`.
        callbacks: transformers' TrainerCallbacks.
        allowed: names of the settings' `arguments` that may do more than train.
        earlier: input statistics of the experts of earlier tasks, by task: those that `protect` protects.

    Raises:
        RecallError: if settings, rows, base or `init_from` cannot be used, or something else lies at `out`.
    """
    settings = settings or TrainSettings()
    on = training_device(device)
    arguments = check_arguments(settings, allowed) | arguments_on(on) | settings.arguments
    tokenizer = load_tokenizer(base)
    settings = settings.model_copy(update={"template": template_of(rows, settings.template)})
    encoded = encode_rows(rows, tokenizer, **settings.encoding)
    models = FileStates.of([base, *([init_from] if init_from else [])])
    protect = settings.protect
    protected = dict(earlier or {}) if protect is not None and protect.is_on else {}
    if protect is not None and protect.asks_for_rows and init_from is not None:
        what, fix = "an adapter that is trained further has its rows of A already", "leave out `protect.rows_of_a`, or train a new adapter"
        raise RunError(what, where=init_from, fix=fix)
    key = _key(base, encoded, settings, init_from, on, protected)
    work = out.with_name(out.name + checkpoints.SUFFIX)
    if (trained := _find_trained(out, key)) is not None:
        checkpoints.remove_folder(work)  # the training was stopped between writing the expert and removing the checkpoints
        return trained
    place = OutputFolder(out, overwrite=overwrite)
    place.check({"the base": base, **({"what training starts from": init_from} if init_from else {})})
    start = time.monotonic()
    checkpoint = checkpoints.open_folder(work, key)
    with hushed(), TRAIN_LOCK:
        model = _make_model(base, settings, init_from)
        arguments["output_dir"] = str(work)
        rows_of_a: RowsOfA = "free" if init_from or settings.kind in WHOLE else "isolated"
        protection = _protect(model, protected, settings, rows_of_a, base, encoded)
        listeners = {"progress": progress, "callbacks": [*callbacks, *([protection] if protection else [])]}
        trainer = _make_trainer(model, tokenizer, encoded, settings, arguments, **listeners)
        with _explain_full_disk(work):
            trainer.run(resume_from=checkpoint)
            trainer.check_trained()
            models.check()
            result = TrainResult(
                out,
                steps=trainer.state.global_step,
                losses=tuple(entry["loss"] for entry in trainer.state.log_history if "loss" in entry),
                tokens=sum(len(row.input_ids) for row in encoded),
                seconds=time.monotonic() - start,
                resumed_at=checkpoints.step_of(checkpoint) if checkpoint else 0,
            )
            facts = {"protection": protection.facts()} if protection else {}
            _write_expert(place, trainer.model, tokenizer, result, key, settings, on, facts)
    checkpoints.remove_folder(work)
    return result


def check_rows(base: Path, rows: Sequence[Row], settings: TrainSettings) -> None:
    """Check that every row can be learnt, and read whole by the model, or raise DataError with those that cannot."""
    from recall_merge.evaluation.lm_eval_private import window_of

    tokenizer = load_tokenizer(base)
    encode_rows(rows, tokenizer, window=window_of(base, tokenizer), **settings.encoding)


def _key(
    base: Path,
    encoded: Sequence[EncodedRow],
    settings: TrainSettings,
    init_from: Path | None,
    device: torch.device,
    protected: Earlier,
) -> str:
    """SHA-256 of everything that an expert depends on: contents, never names of files."""

    def weights(folder: Path) -> list[str]:
        return [hash_file(file) for file in sorted(folder.glob("*.safetensors"))]

    open_checkpoint(base)
    parts = {
        "base": weights(base),
        "config": hash_file(base / "config.json"),
        "rows": hashlib.sha256(json.dumps([[row.input_ids, row.labels] for row in encoded]).encode()).hexdigest(),
        "settings": settings.facts,
        "init_from": weights(init_from) if init_from else None,
        **({} if device.type == "cpu" else {"device": hardware(device)}),
        **({"protected": {task: statistics.facts[WEIGHTS] for task, statistics in protected.items()}} if protected else {}),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _find_trained(out: Path, key: str) -> TrainResult | None:
    """The expert at `out`, if it was trained under this key and its files are as they were written."""
    try:
        record = verify_files(out)
    except ResultError:
        return None
    if record.get("key") != key:
        return None
    training = record["training"]
    return TrainResult(out, training["steps"], tuple(training["losses"]), training["tokens"], seconds=0.0, reused=True)


def _make_model(base: Path, settings: TrainSettings, init_from: Path | None) -> Any:
    """The base with a trainable adapter; or, to train all weights, the base or a descendant of it."""
    import transformers

    transformers.set_seed(settings.seed)  # an adapter's A is drawn before trl sets the seed
    if settings.kind in WHOLE:
        if init_from is not None and is_adapter(init_from):
            what = "a whole model is to be trained, but the model to continue from is an adapter"
            raise RunError(what, where=init_from, fix="merge it first")
        whole = build_model(init_from or base, dtype=settings.dtype)
        return whole if settings.kind == "full" else _with_tuner(whole, "OSFConfig", settings, base)
    if init_from is not None:
        _check_same_shape(settings, init_from)
        adapted: Any = load_trainable(init_from, base, dtype=settings.dtype)
    else:
        sizes = {"r": settings.rank, "lora_alpha": settings.alpha, "lora_dropout": settings.dropout, "use_dora": settings.kind == "dora"}
        adapted = _with_tuner(build_model(base, dtype=settings.dtype), "LoraConfig", settings, base, **sizes)
    adapted.active_peft_config.base_model_name_or_path = str(base)
    return adapted


def _with_tuner(model: Any, config: str, settings: TrainSettings, base: Path, **sizes: Any) -> Any:
    """A model with PEFT's parts in it, which alone are trained. `config` is the class of the parts' settings."""
    import peft

    try:
        return peft.get_peft_model(
            model, getattr(peft, config)(target_modules=settings.targets, task_type=peft.TaskType.CAUSAL_LM, **sizes)
        )
    except ValueError as error:  # modules that the base does not have
        raise RunError(f"peft refuses: {error}", where=base, fix="check `targets`") from error


def _check_same_shape(settings: TrainSettings, adapter: Path) -> None:
    """An adapter that training continues from keeps its form; the settings must say the same."""
    if not is_adapter(adapter):
        what = "an adapter is to be trained, but the model to continue from is none"
        raise RunError(what, where=adapter, fix="give an adapter, or `kind: full`")
    config = read_json(adapter / CONFIG)
    theirs = {"rank": config.get("r"), "alpha": config.get("lora_alpha"), "kind": "dora" if config.get("use_dora") else "lora"}
    faults = Faults()
    for name, value in theirs.items():
        if getattr(settings, name) != value:
            what = f"`{name}` is {getattr(settings, name)}, but the adapter to continue from has {value}"
            faults.add(what, where=adapter, fix=f"give `{name}: {value}`")
    faults.raise_any(RunError)


def _make_trainer(
    model: Any, tokenizer: Any, encoded: Sequence[EncodedRow], settings: TrainSettings, arguments: dict[str, Any], **listeners: Any
) -> Trainer:
    import datasets
    from trl.trainer.sft_config import SFTConfig

    from recall_merge.training.trl_private import Trainer

    data = datasets.Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in encoded])
    try:
        return Trainer(model=model, args=SFTConfig(**arguments), train_dataset=data, processing_class=tokenizer, **listeners)
    except (ValueError, TypeError, ImportError) as error:
        raise RunError(f"trl refuses these arguments: {error}", where=", ".join(settings.arguments)) from error


def _protect(
    model: Any, protected: Earlier, settings: TrainSettings, rows_of_a: RowsOfA, base: Path, rows: Sequence[EncodedRow]
) -> Protection | None:
    """What protects earlier tasks, if there are any. `rows_of_a` is for settings that do not say where they begin."""
    if not protected or settings.protect is None:
        return None
    from recall_merge.training.protection import Protection

    protect = settings.protect.model_copy(update={"rows_of_a": settings.protect.rows_of_a or rows_of_a})
    return Protection(protected, protect, open_checkpoint(base), model, rows=rows, seed=settings.seed)


@contextmanager
def _explain_full_disk(work: Path) -> Iterator[None]:
    """Name the folder when torch or safetensors, by errors of their own, report a disk that is full or broken."""
    from safetensors import SafetensorError

    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        if not any(word in str(error) for word in ("inline_container", "PytorchStreamWriter", "I/O error")):
            raise
        fix = "make room, or check the disk; training continues from its last whole checkpoint"
        raise OutputError("what was trained cannot be written", where=work, fix=fix) from error


def _write_expert(
    place: OutputFolder,
    model: Any,
    tokenizer: Any,
    result: TrainResult,
    key: str,
    settings: TrainSettings,
    device: torch.device,
    facts: Mapping[str, Any],
) -> None:
    with place as folder:
        if settings.kind == "osf":
            model = model.merge_and_unload()
        model.save_pretrained(folder.path)
        if isinstance(settings.template, str):
            tokenizer.chat_template = settings.template
            (folder.path / "chat_template.jinja").write_text(settings.template, "utf-8")
        (folder.path / "README.md").unlink(missing_ok=True)  # PEFT's model card is all placeholders
        if settings.kind in WHOLE:
            tokenizer.save_pretrained(folder.path)
        else:
            config = folder.path / CONFIG
            lists = {name: sorted(value) for name, value in read_json(config).items() if name in SETS and isinstance(value, list)}
            # PEFT keeps these as sets, and writes them in an order that differs between processes
            config.write_text(json.dumps(read_json(config) | lists, indent=2, sort_keys=True), "utf-8")
        training = {"steps": result.steps, "tokens": result.tokens, "losses": result.losses, "seconds": round(result.seconds, 1)}
        record = {"key": key, "settings": settings.facts, "training": training, **facts}
        record |= {"device": hardware(device), "versions": versions()}
        write_record(folder.path, record)
        folder.commit()
