"""An expert's card: run it on the typical samples of its own rows, keep the moments of what its linear maps read, and no text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from recall_merge.config import MergeRun, Representations
from recall_merge.errors import CheckpointError
from recall_merge.files.cards import Card, open_card, write_card
from recall_merge.files.experts import Expert, hash_expert
from recall_merge.files.names import Names
from recall_merge.progress import Progress, Silent
from recall_merge.recipes.plan import Plan, make_plan
from recall_merge.recipes.typical import build_expert, expert_tokenizer, typical_texts

if TYPE_CHECKING:
    from recall_merge.maths.moments import Moment

RANK = 8
RULE = Representations.model_validate({})


def make_card(run: MergeRun, *, rank: int = RANK, folder: Path | None = None, progress: Progress | None = None) -> Card:
    """Make the card of a run's newest expert from the run's samples, and write it into the expert's folder.

    Args:
        rank: directions kept of each moment.
        folder: where to write it instead.

    Raises:
        RecallError: with every fault of the run; or if the folder cannot be written to.
    """
    plan, progress = make_plan(run, writes=False), progress or Silent()
    expert = plan.experts[-1]
    texts, samples, _ = typical_texts(plan, RULE, progress)
    groups, tensors = _moments(plan, expert, texts, rank, progress)
    facts = {
        "expert": hash_expert(expert),
        "base": plan.base.fingerprint,
        "samples": len(texts),
        "rows": [sample.row for sample in samples],
        "tokens": sum(sample.tokens for sample in samples),
        "rank": rank,
    }
    target = folder or expert.folder
    try:
        target.mkdir(parents=True, exist_ok=True)
        write_card(target, groups, tensors, facts)
    except OSError as error:
        fix = "give another folder with --out, and name it under `card:` of the expert"
        raise CheckpointError(f"the card cannot be written: {error.strerror}", where=target, fix=fix) from error
    card = open_card(target)
    assert card is not None
    return card


def _moments(
    plan: Plan, expert: Expert, texts: list[str], rank: int, progress: Progress
) -> tuple[dict[str, Moment], dict[str, tuple[str, int]]]:
    from recall_merge.maths.moments import compress
    from recall_merge.models.hidden import tokenize
    from recall_merge.models.moments import input_moments

    tokens = tokenize(texts, expert_tokenizer(plan, expert), max_tokens=plan.samples.max_tokens)
    with progress.stage(f"card of {expert.name}", sum(map(len, tokens)), "tokens") as advance:
        found = input_moments(build_expert(plan, expert, RULE), tokens, progress=advance)
    names = Names(plan.base)
    groups: dict[str, Moment] = {}
    tensors: dict[str, tuple[str, int]] = {}
    for number, inputs in enumerate(found):
        stored = [
            name
            for module in inputs.modules
            if (name := names.find(f"{module}.weight")) is not None and name not in plan.base.token_tensors
        ]
        if stored and inputs.tokens:  # a head is no map to align; of a map that nothing reached there is nothing to tell
            group = f"{number:04d}"
            groups[group] = compress(inputs.moment, rank)
            tensors |= dict.fromkeys(stored, (group, inputs.axis))
    return groups, tensors
