"""Fine-tune a base on rows: trl's SFTTrainer, over a PEFT adapter or over all weights. What comes out is an expert."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recall_merge.files.adapter import CONFIG, is_adapter
from recall_merge.files.checkpoint import open_checkpoint, read_json
from recall_merge.files.durable import is_partial, write_whole
from recall_merge.files.experts import hash_file
from recall_merge.files.output import OutputFolder
from recall_merge.files.record import RECORD, verify_files, versions, write_record
from recall_merge.files.rows import Row, numbered
from recall_merge.models.load import build_model, load_tokenizer, load_trainable
from recall_merge.models.tokens import EncodedRow, encode_rows
from recall_merge.runtime.errors import CheckpointError, DataError, Faults, OutputError, ResultError, RunError
from recall_merge.runtime.progress import Progress, Silent
from recall_merge.training.settings import TrainSettings, check_arguments, hushed

if TYPE_CHECKING:
    from recall_merge.training.trainer import OnStep, Trainer


WORK = ".training.partial"  # of the folder of checkpoints, after the expert's name
SETS = ("target_modules", "exclude_modules", "modules_to_save")  # of an adapter's config
NOTE = "key.json"  # in it: what the checkpoints were made from, and a sign that the folder is ours


@dataclass(frozen=True)
class TrainResult:
    """An expert, and how its training went."""

    folder: Path
    steps: int
    losses: tuple[float, ...]
    """Of every logged step, those before a restart too."""
    tokens: int
    """That one pass over the rows reads."""
    seconds: float
    """Of this call; 0 for an expert that was there."""
    resumed_at: int = 0
    """The step that an earlier, stopped training had reached."""
    reused: bool = False
    """An expert of the same base, rows and settings was there, whole."""


def train(
    base: Path,
    rows: Sequence[Row],
    out: Path,
    settings: TrainSettings | None = None,
    *,
    init_from: Path | None = None,
    overwrite: bool = False,
    on_step: OnStep | None = None,
    progress: Progress | None = None,
    callbacks: Sequence[Any] = (),
) -> TrainResult:
    """Train an expert and write it to `out`, whole or not at all.

    A training that was stopped goes on from its last checkpoint when it is asked for again. What is there already is used as it is if
    base, rows, settings and every byte of the result are what they were. On one machine, with one number of threads, the same call gives
    the same expert, whether it was stopped in between or not.

    Args:
        base: a model folder; recorded in an adapter's `base_model_name_or_path` as given.
        init_from: an expert to go on from, of the same kind: fine-tuning one task after another.
        overwrite: replace another expert at `out`.
        on_step: called with a step's number, how many there are, and its loss.
        callbacks: transformers' TrainerCallbacks.

    Raises:
        RunError: if settings or arguments do not fit.
        DataError: if a row has nothing to learn from.
        CheckpointError: if base or `init_from` cannot be used.
        OutputError: if something else lies at `out`.
    """
    settings = settings or TrainSettings()
    arguments = check_arguments(settings)
    tokenizer = load_tokenizer(base)
    encoded = encode_rows(rows, tokenizer, **settings.encoding)
    key = _key(base, encoded, settings, init_from)
    work = out.with_name(out.name + WORK)
    if (found := find_trained(out, key)) is not None:
        if (work / NOTE).is_file():
            _discard(work)  # a stop fell between the expert and the end of its checkpoints
        return found
    _check_place(out, overwrite)
    start = time.monotonic()
    checkpoint = _open_work(work, key)
    with hushed():
        model = _model(base, settings, init_from)
        trainer, teller = _trainer(model, tokenizer, encoded, settings, arguments | {"output_dir": str(work)}, on_step, progress, callbacks)
        with teller.open_stages, _saving(work):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        state = trainer.state
        result = TrainResult(
            out,
            steps=state.global_step,
            losses=tuple(entry["loss"] for entry in state.log_history if "loss" in entry),
            tokens=sum(len(row.input_ids) for row in encoded),
            seconds=time.monotonic() - start,
            resumed_at=int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0,
        )
        with _saving(work):
            _write(trainer.model, tokenizer, base, result, key, settings)
    _discard(work)
    return result


def find_trained(out: Path, key: str) -> TrainResult | None:
    """The expert at `out` if it was trained under this key and is as it was written."""
    try:
        record = verify_files(out)
    except ResultError:
        return None
    if record.get("key") != key:
        return None
    trained = record["training"]
    return TrainResult(out, trained["steps"], tuple(trained["losses"]), trained["tokens"], seconds=0.0, reused=True)


def check_rows(base: Path, rows: Sequence[Row], settings: TrainSettings, window: int) -> None:
    """Check that every row can be learnt, and that the model can read it whole.

    Args:
        window: tokens that the model reads at most.

    Raises:
        DataError: with every row that has nothing to learn from, and those that are too long.
        CheckpointError: if the base has no usable tokenizer.
    """
    encoded = encode_rows(rows, load_tokenizer(base), **settings.encoding)
    if long := [row.index for row, tokens in zip(rows, encoded, strict=True) if len(tokens.input_ids) > window]:
        what = f"{len(long)} of {len(rows)} training rows are longer than the {window} tokens that the model can read"
        raise DataError(what, where=numbered(long), fix="leave them out, or have them cut: `max_length` of the training")


def _key(base: Path, encoded: Sequence[EncodedRow], settings: TrainSettings, init_from: Path | None) -> str:
    """SHA-256 of all that an expert depends on: contents, never names of files."""
    open_checkpoint(base)
    parts = {
        "base": _weights(base),
        "config": hash_file(base / "config.json"),
        "rows": hashlib.sha256(json.dumps([[row.input_ids, row.labels] for row in encoded]).encode()).hexdigest(),
        "settings": settings.model_dump(mode="json"),
        "init_from": _weights(init_from) if init_from else None,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _weights(folder: Path) -> list[str]:
    return [hash_file(file) for file in sorted(folder.glob("*.safetensors"))]


def _check_place(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise OutputError("something else lies where the expert is to be", where=out, fix="choose another folder, or have it replaced")
    if not (out / RECORD).is_file():
        raise OutputError("what lies where the expert is to be is none of ours, and is not replaced", where=out, fix="move it away")


def _open_work(work: Path, key: str) -> Path | None:
    """Make the folder of checkpoints, or find the last whole checkpoint there; those of another base, rows or settings are removed."""
    note = work / NOTE
    if work.exists():
        if not note.is_file() and not all(is_partial(file, note) for file in work.iterdir()):
            raise OutputError("a folder that is not ours lies where checkpoints are to be kept", where=work, fix="move it away")
        with suppress(CheckpointError):
            if read_json(note).get("key") == key:
                return _last_checkpoint(work)
        _discard(work)
    work.mkdir(parents=True)
    write_whole(note, json.dumps({"key": key}) + "\n")
    return None


def _discard(work: Path) -> None:
    """Remove the folder of checkpoints. The note goes last, empty: what a stop leaves is taken neither for whole nor for a stranger's."""
    note = work / NOTE
    write_whole(note, "{}\n")
    for place in work.iterdir():
        if place.is_dir():
            shutil.rmtree(place)
        elif place != note:
            place.unlink()
    note.unlink()
    work.rmdir()


@contextmanager
def _saving(work: Path) -> Iterator[None]:
    """torch and safetensors tell of a disk that is full or broken by errors of their own."""
    from safetensors import SafetensorError

    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        if not any(word in str(error) for word in ("inline_container", "PytorchStreamWriter", "I/O error")):
            raise
        fix = "make room, or check the disk; training goes on from its last whole checkpoint"
        raise OutputError("what was trained cannot be written", where=work, fix=fix) from error


def _last_checkpoint(work: Path) -> Path | None:
    whole = []
    for folder in work.glob("checkpoint-*"):
        try:
            read_json(folder / "trainer_state.json")  # written last, so its presence means that all is there
        except CheckpointError:
            continue
        whole.append(folder)
    return max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


def _model(base: Path, settings: TrainSettings, init_from: Path | None) -> Any:
    """The base with an adapter that can be trained, or the base or a descendant of it, whole."""
    import transformers

    transformers.set_seed(settings.seed)  # the adapter's A is drawn before trl sets the seed
    if settings.kind == "full":
        if init_from is not None and is_adapter(init_from):
            raise RunError("all weights are to be trained, but what to go on from is an adapter", where=init_from, fix="merge it first")
        return build_model(init_from or base, dtype=settings.dtype)
    import peft

    if init_from is None:
        model = build_model(base, dtype=settings.dtype)
        config = peft.LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,  # type: ignore[arg-type]
            lora_dropout=settings.dropout,
            target_modules=settings.targets,
            use_dora=settings.kind == "dora",
            task_type=peft.TaskType.CAUSAL_LM,
        )
        try:
            adapted: Any = peft.get_peft_model(model, config)
        except ValueError as error:  # modules that the base does not have
            raise RunError(f"peft refuses: {error}", where=base, fix="check `targets`") from error
    else:
        _check_same_shape(settings, init_from)
        adapted = load_trainable(init_from, base, dtype=settings.dtype)
    adapted.active_peft_config.base_model_name_or_path = str(base)
    return adapted


def _check_same_shape(settings: TrainSettings, adapter: Path) -> None:
    """An adapter that training goes on from keeps its form; settings that were given must say the same."""
    if not is_adapter(adapter):
        raise RunError("an adapter is to be trained, but what to go on from is none", where=adapter, fix="give an adapter, or `kind: full`")
    config = read_json(adapter / CONFIG)
    theirs = {"rank": config.get("r"), "alpha": config.get("lora_alpha"), "kind": "dora" if config.get("use_dora") else "lora"}
    faults = Faults()
    for name, value in theirs.items():
        if getattr(settings, name) != value:
            faults.add(f"`{name}` is {getattr(settings, name)}, but the adapter to go on from has {value}", where=adapter, fix="give that")
    faults.raise_any(RunError)


def _trainer(
    model: Any,
    tokenizer: Any,
    encoded: Sequence[EncodedRow],
    settings: TrainSettings,
    arguments: Mapping[str, Any],
    on_step: OnStep | None,
    progress: Progress | None,
    callbacks: Sequence[Any],
) -> tuple[Trainer, Any]:
    import datasets
    from trl.trainer.sft_config import SFTConfig

    from recall_merge.training.trainer import Teller, Trainer

    data = datasets.Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in encoded])
    teller = Teller(progress or Silent(), on_step)
    try:
        trainer = Trainer(
            model=model,
            args=SFTConfig(**arguments),
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[teller, *callbacks],
        )
    except (ValueError, TypeError, ImportError) as error:
        raise RunError(f"trl refuses these arguments: {error}", where=", ".join(settings.arguments)) from error
    return trainer, teller


def _write(model: Any, tokenizer: Any, base: Path, result: TrainResult, key: str, settings: TrainSettings) -> None:
    with OutputFolder(result.folder, overwrite=True) as folder:
        model.save_pretrained(folder.path)
        (folder.path / "README.md").unlink(missing_ok=True)  # peft's statistics is all placeholders
        _put_in_order(folder.path / CONFIG)
        if settings.kind == "full":
            tokenizer.save_pretrained(folder.path)
        trained = {"steps": result.steps, "tokens": result.tokens, "losses": result.losses, "seconds": round(result.seconds, 1)}
        record = {"key": key, "settings": settings.model_dump(mode="json"), "training": trained, "versions": versions()}
        write_record(folder.path, record)
        folder.commit()


def _put_in_order(config: Path) -> None:
    """Sort what PEFT keeps as a set and writes in an order that chance gives each process."""
    if not config.exists():
        return
    data = read_json(config)
    for key in SETS:
        if isinstance(data.get(key), list):
            data[key].sort()
    config.write_text(json.dumps(data, indent=2, sort_keys=True), "utf-8")
