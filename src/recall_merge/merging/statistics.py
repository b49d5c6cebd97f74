"""Input statistics of an expert: run it on the typical samples of its own rows, and keep what its linear layers read. No text is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from recall_merge.files.experts import Expert, hash_expert
from recall_merge.files.names import Names
from recall_merge.files.statistics import GRADIENTS, MIXTURES, InputStatistics, open_statistics, write_statistics
from recall_merge.maths.trimming import Draws, Start
from recall_merge.merging.forward import check_finite, expert_tokenizer, layer_parameters, load_expert, start_forward, where_it_fits
from recall_merge.merging.layerwise import whole_note
from recall_merge.merging.plan import Plan, make_plan
from recall_merge.merging.run import DEFAULT_RECALL, STATISTICS_SPACE, MergeRun
from recall_merge.merging.samples import choose_samples, encode_samples
from recall_merge.merging.stored_moments import TRAINING, Found, StoredMoments, maps_in_files
from recall_merge.models.input_moments import HELD_OF_MANY, Inputs, InputSketches, inputs_of_whole
from recall_merge.models.tokens import EncodedRow
from recall_merge.runtime.device import hardware, has_float64
from recall_merge.runtime.errors import CheckpointError, NotLayerwise
from recall_merge.runtime.progress import Progress, Silent

RANK = 24


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
    return apply(make_plan(run, writes=False), rank=rank, gradients=gradients, folder=folder, progress=progress)


def apply(
    plan: Plan, *, rank: int = RANK, gradients: bool = False, folder: Path | None = None, progress: Progress | None = None
) -> InputStatistics:
    """What `make_statistics` does, for a plan."""
    progress, expert = progress or Silent(), plan.experts[-1]
    samples = choose_samples(plan, DEFAULT_RECALL, progress, space=STATISTICS_SPACE)
    rows = encode_samples(plan, samples.rows, expert_tokenizer(plan, expert))

    def draw(name: str) -> Start:
        return Draws(plan.run.seed, name, (expert.name,)).streams[0]

    found, notes = _find_inputs(plan, expert, rows, rank, draw, gradients, progress)
    stored = StoredMoments(found, expert, rank, draw)
    facts = {
        "expert": hash_expert(expert),
        "base": plan.base.fingerprint,
        "samples": len(rows),
        "rows": [sample.row for sample in samples.rows],
        "tokens": sum(len(row.input_ids) for row in rows),
        "rank": rank,
        GRADIENTS: gradients,
        MIXTURES: stored.mixtures,
        "device": hardware(plan.device),
        "notes": [*samples.notes, *notes],
    }
    target = folder or expert.folder
    plan.inputs.check()
    try:
        target.mkdir(parents=True, exist_ok=True)
        write_statistics(target, stored.parts, stored.tensors, facts)
    except OSError as error:
        fix = "give another folder with --out, and name it under `stats:` of the expert"
        raise CheckpointError(f"the input statistics cannot be written: {error.strerror}", where=target, fix=fix) from error
    statistics = open_statistics(target)
    assert statistics is not None
    return statistics


def _find_inputs(
    plan: Plan, expert: Expert, rows: Sequence[EncodedRow], rank: int, draw: Callable[[str], Start], gradients: bool, progress: Progress
) -> tuple[Found, list[str]]:
    """What the expert's linear maps read of the rows: block by block where its architecture allows that and no pass back is wanted.

    The whole model is run on the processor.
    """
    notes: list[str] = []
    what = f"input statistics of {expert.name}"
    if not gradients:
        try:
            with progress.stage(what, plan.base.layers.blocks + 1, "layers") as advance:
                tokens = [row.input_ids for row in rows]
                return where_it_fits(plan, lambda plan: _inputs_by_layer(plan, expert, tokens, rank, draw, notes, advance), notes), notes
        except NotLayerwise as error:
            notes.append(whole_note(error))
    model = load_expert(plan, expert, DEFAULT_RECALL)
    maps = maps_in_files(plan.base, model, notes)
    squares: dict[str, Tensor] | None = {} if gradients else None
    sketches = InputSketches({name: map_.shape for name, map_ in maps.items()}, rank, draw, held=HELD_OF_MANY)
    with progress.stage(what, sum(len(row.input_ids) for row in rows), "tokens") as advance:
        try:
            inputs = inputs_of_whole(model, rows, sketches, gradients=squares, seed=plan.run.seed, progress=advance)
        except FloatingPointError as error:
            raise CheckpointError(f"the logits of expert '{expert.name}' are NaN or infinite", where=expert.folder, fix=TRAINING) from error
    return Found(maps, inputs, squares or {}), notes


def _inputs_by_layer(
    plan: Plan,
    expert: Expert,
    tokens: Sequence[Sequence[int]],
    rank: int,
    draw: Callable[[str], Start],
    notes: list[str],
    advance: Callable[[int], None],
) -> Found:
    layers, cpu = plan.base.layers, torch.device("cpu")
    inputs: list[Inputs] = []
    has_mixtures = any(len(shape) == 3 for model in Names(plan.base).models for shape in model.parameters.values())
    with start_forward(plan, expert, DEFAULT_RECALL, tokens, one_by_one=has_mixtures) as forward:  # an expert's tokens come without places
        maps = maps_in_files(plan.base, forward.model, notes)
        if after := [place.name for map_ in maps.values() for place in map_.places if layers.of(place.name) == layers.last]:
            raise NotLayerwise(f"its linear map '{after[0]}' follows the blocks")
        sketches = InputSketches({name: map_.shape for name, map_ in maps.items()}, rank, draw)
        forward.watch(maps.keys(), sketches.fold if has_float64(plan.device) else sketches.fold_here)
        for layer in range(layers.blocks + 1):
            check_finite(plan, expert, forward.step(layer_parameters(plan, expert, DEFAULT_RECALL, layer, tokens)))
            inputs += [replace(found, moment=found.moment.to(cpu)) for found in sketches.finish(plan.threads)]
            advance(1)
    return Found(maps, inputs)
