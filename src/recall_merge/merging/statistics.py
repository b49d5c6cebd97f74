"""Input statistics of an expert: run it on the typical samples of its own rows, and keep what its linear layers read. No text is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from recall_merge.files.experts import Expert, hash_expert
from recall_merge.files.names import Names
from recall_merge.files.statistics import GRADIENTS, InputStatistics, gradient_of, open_statistics, parts_of, write_statistics
from recall_merge.maths.trimming import Draws, Start
from recall_merge.merging.forward import check_finite, expert_tokenizer, layer_parameters, load_expert, start_forward, where_it_fits
from recall_merge.merging.layerwise import whole_note
from recall_merge.merging.plan import Plan, make_plan
from recall_merge.merging.run import DEFAULT_RECALL, MergeRun
from recall_merge.merging.samples import choose_samples, encode_samples
from recall_merge.merging.unsound import is_finite
from recall_merge.models.tokens import EncodedRow
from recall_merge.runtime.device import hardware, has_float64, prefers_bfloat16
from recall_merge.runtime.errors import CheckpointError, NotLayerwise
from recall_merge.runtime.progress import Progress, Silent

if TYPE_CHECKING:
    from recall_merge.models.input_moments import Inputs

RANK = 24
TRAINING = "look at its training"


def make_statistics(
    run: MergeRun, *, rank: int = RANK, gradients: bool = False, folder: Path | None = None, progress: Progress | None = None
) -> InputStatistics:
    """Make the input statistics of a run's newest expert from the run's samples, and write them into the expert's folder.

    Memory holds one layer of the expert, and of the samples their hidden states.

    Args:
        rank: directions to keep of each second moment.
        gradients: add the squared gradients of the layers' outputs, which `fisher` needs, by passes back through the whole expert.
        folder: another folder to write to.

    Raises:
        RecallError: with every fault of the run; or if the folder cannot be written to.
    """
    plan, progress = make_plan(run, writes=False), progress or Silent()
    expert = plan.experts[-1]
    precision, said = _precision(plan.device)
    samples = choose_samples(plan, DEFAULT_RECALL.model_copy(update={"precision": precision}), progress)
    rows = encode_samples(plan, samples.rows, expert_tokenizer(plan, expert))
    inputs, notes = _inputs(plan, expert, rows, rank, gradients, progress)
    parts, tensors = _stored(plan, expert, inputs)
    facts = {
        "expert": hash_expert(expert),
        "base": plan.base.fingerprint,
        "samples": len(rows),
        "rows": [sample.row for sample in samples.rows],
        "tokens": sum(len(row.input_ids) for row in rows),
        "rank": rank,
        GRADIENTS: gradients,
        "device": hardware(plan.device),
        "notes": [*samples.notes, *said, *notes],
    }
    target = folder or expert.folder
    plan.inputs.check()
    try:
        target.mkdir(parents=True, exist_ok=True)
        write_statistics(target, parts, tensors, facts)
    except OSError as error:
        fix = "give another folder with --out, and name it under `stats:` of the expert"
        raise CheckpointError(f"the input statistics cannot be written: {error.strerror}", where=target, fix=fix) from error
    statistics = open_statistics(target)
    assert statistics is not None
    return statistics


def _precision(device: torch.device) -> tuple[str, list[str]]:
    """The dtype in which samples are chosen, and a note on it: bfloat16 where the device multiplies it, which takes half the time.

    What is chosen differs, since centroids have several rows near to them; how near does not (docs/statistics.md).
    """
    if prefers_bfloat16(device):
        return "bfloat16", [f"typical samples were chosen in bfloat16, on {hardware(device)}"]
    known = torch.cpu.get_capabilities()
    if any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")):
        return "bfloat16", ["typical samples were chosen in bfloat16, which this processor multiplies"]
    return "float32", []


def _inputs(
    plan: Plan, expert: Expert, rows: Sequence[EncodedRow], rank: int, gradients: bool, progress: Progress
) -> tuple[list[Inputs], list[str]]:
    """What the expert's linear maps read of the rows: block by block where its architecture allows that and no pass back is wanted.

    The whole model is run on the processor.
    """
    notes: list[str] = []

    def draw(module: str) -> Start:
        return Draws(plan.run.seed, module, (expert.name,)).streams[0]

    what = f"input statistics of {expert.name}"
    if not gradients:
        try:
            with progress.stage(what, plan.base.layers.blocks + 1, "layers") as advance:
                tokens = [row.input_ids for row in rows]
                return where_it_fits(plan, lambda plan: _inputs_by_layer(plan, expert, tokens, rank, draw, advance), notes), notes
        except NotLayerwise as error:
            notes.append(whole_note(error))
    from recall_merge.models.input_moments import HELD_OF_MANY, InputSketches, inputs_of_whole

    model = load_expert(plan, expert, DEFAULT_RECALL)
    maps = {name: module for name, module, _ in _maps(plan, model)}
    sketches = InputSketches(maps, rank, draw, held=HELD_OF_MANY)
    with progress.stage(what, sum(len(row.input_ids) for row in rows), "tokens") as advance:
        try:
            return inputs_of_whole(model, rows, sketches, gradients=gradients, seed=plan.run.seed, progress=advance), notes
        except FloatingPointError as error:
            raise CheckpointError(f"the logits of expert '{expert.name}' are NaN or infinite", where=expert.folder, fix=TRAINING) from error


def _inputs_by_layer(
    plan: Plan, expert: Expert, tokens: Sequence[Sequence[int]], rank: int, draw: Callable[[str], Start], advance: Callable[[int], None]
) -> list[Inputs]:
    from recall_merge.models.input_moments import InputSketches

    layers, cpu = plan.base.layers, torch.device("cpu")
    inputs: list[Inputs] = []
    with start_forward(plan, expert, DEFAULT_RECALL, tokens) as forward:
        maps = list(_maps(plan, forward.model))
        if after := [name for name, _, stored in maps if layers.of(stored) == layers.last]:
            raise NotLayerwise(f"its linear map '{after[0]}' follows the blocks")
        sketches = InputSketches({name: module for name, module, _ in maps}, rank, draw)
        forward.watch(sketches.maps, sketches.fold if has_float64(plan.device) else sketches.fold_here)
        for layer in range(layers.blocks + 1):
            check_finite(plan, expert, forward.step(layer_parameters(plan, expert, DEFAULT_RECALL, layer, tokens)))
            inputs += [replace(found, moment=found.moment.to(cpu)) for found in sketches.finish(plan.threads)]
            advance(1)
    return inputs


def _maps(plan: Plan, model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """The linear maps that can be aligned: their names in memory, and those of their tensors in the files. A head is none of them."""
    from recall_merge.models.input_moments import linear_maps

    names = Names(plan.base)
    for name, module in linear_maps(model).items():
        if (stored := names.find(f"{name}.weight")) is not None and stored not in plan.base.token_tensors:
            yield name, module, stored


def _stored(plan: Plan, expert: Expert, inputs: Iterable[Inputs]) -> tuple[dict[str, Tensor], dict[str, tuple[str, int]]]:
    """The numbers by name, and for each tensor of the base its group of inputs and the axis along which they run."""
    names = Names(plan.base)
    parts: dict[str, Tensor] = {}
    tensors: dict[str, tuple[str, int]] = {}
    for number, group in enumerate(inputs):
        stored = [str(names.find(f"{module}.weight")) for module in group.modules]
        key = f"{number:04d}"
        own = dict(zip(parts_of(key), (group.moment.factor, group.moment.rest), strict=True))
        own |= dict(zip(map(gradient_of, stored), group.gradients, strict=False))
        if not all(is_finite(numbers.bfloat16()) for numbers in own.values()):  # as they are stored
            what = f"the input statistics of expert '{expert.name}' overflow in '{stored[0]}'"
            raise CheckpointError(what, where=expert.folder, fix=TRAINING)
        parts |= own
        tensors |= dict.fromkeys(stored, (key, group.axis))
    return parts, tensors
