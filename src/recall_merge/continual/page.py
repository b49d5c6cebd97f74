"""The page of a workspace: what was gained and forgotten, stage by stage and item by item, its lineage, and its current merge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from recall_merge.continual.branch_section import BranchScores, branch_blocks
from recall_merge.continual.kept_scores import read_scores
from recall_merge.continual.protected import protected_by
from recall_merge.continual.state import Stage, State, found_path, locate_model, read_journal, unchanged_rows
from recall_merge.continual.steps import fingerprint
from recall_merge.continual.workspace import Status, status
from recall_merge.files.checkpoint import open_checkpoint, read_json
from recall_merge.files.record import RECORD
from recall_merge.merging.result import check_record
from recall_merge.report import merge_charts
from recall_merge.report import workspace_charts as charts
from recall_merge.report.anatomy import Models, anatomy
from recall_merge.report.merge_page import MergeFacts, about, lede, merge_sections
from recall_merge.report.page import Block, Figure, Page, Section, Text, Tree
from recall_merge.report.words import Words, sample_texts
from recall_merge.runtime.errors import RunError
from recall_merge.runtime.progress import Progress


def make_page(folder: Path, *, text: bool, cache: Path, progress: Progress) -> Page:
    """The page of a workspace, with the texts of samples, prompts and answers if they are wanted and kept. `cache` keeps what was read
    from the models' weights. Raises RunError if nothing was learnt there yet.
    """
    current, words = status(folder), Words(text)
    state = current.state
    if not state.stages:
        raise RunError("nothing was learnt here yet", where=folder, fix=f"recall learn {folder} --task NAME --train FILE --test FILE")
    scores = {stage.id: read_scores(folder, stage) for stage in state.stages}
    branches = [BranchScores(folder, branch, scores) for branch in current.branches]
    findings, facts = _findings(current, branches), []
    sections = [Section("lineage", "Lineage", list(_lineage(folder, state)))]
    for branch in branches:
        title = "What was gained, kept and forgotten"
        if branch.end != state.head:
            title = f"Another branch, to stage {branch.rows[-1]}"
        sections.append(Section(f"branch-{branch.end}", title, list(branch_blocks(branch, words, first=branch is branches[0]))))
    if protected := list(_protected(folder, state)):
        sections.append(Section("protected", "How far training moved earlier answers", protected))
    if state.head and (found_path(folder, state.model.path) / RECORD).is_file():
        merge = _merge_facts(folder, state, state.stages[state.head - 1], text, cache, progress)
        findings += lede(merge.record)[1:]
        facts += about(merge.record)
        for part in merge_sections(merge):
            sections.append(Section(part.anchor, f"The current merge: {part.title[0].lower()}{part.title[1:]}", part.blocks))
    if words.spent_out:
        facts.append(("texts", "some are left out, to keep this page small"))
    base = state.base.path if state.base.on_hub else Path(state.base.path).name
    subject = f"base {base}; {len(state.stages)} stages; now at stage {state.head}"
    return Page(f"Workspace: {folder.absolute().resolve().name}", subject, findings, sections, facts)


def _findings(current: Status, branches: list[BranchScores]) -> list[str]:
    """The main findings, in sentences."""
    state, sentences = current.state, ["The workspace is at its base."]
    if state.head:
        branch, last = branches[0], len(branches[0].rows) - 1
        ends = [(task, branch.scores.get((0, task)), branch.scores.get((last, task))) for task in branch.branch.tasks]
        gains = [f"{task} {before['score']:.2f} → {after['score']:.2f}" for task, before, after in ends if before and after]
        sentences = [f"From the base to stage {state.head}: {', '.join(gains)}."]
        changes = [change for row, task, change in branch.changes() if row == last and task != branch.branch.tasks[-1]]
        if changes:
            lost, won, n = (sum(counts) for counts in zip(*((c.lost_items, c.won_items, c.n) for c in changes), strict=True))
            sentences.append(f"The last stage lost {lost} and won {won} of the {n} test items of the tasks before it.")
    if current.unfinished is not None:
        spec, part = current.unfinished
        sentences.append(f"Stage {spec.id} ({spec.task.name}) is unfinished, in part '{part}'.")
    return [*sentences, *current.missing]


def _lineage(folder: Path, state: State) -> Iterator[Block]:
    lanes = _lanes(state)
    stages = [{"at": 0, "lane": 0, "name": "base", "now": state.head == 0}]
    stages += [{"at": s.id, "lane": lanes[s.id], "name": f"{s.id} {s.task.name}", "now": s.id == state.head} for s in state.stages]
    edges = [_edge(stage.parent, stage.id, lanes, back=False) for stage in state.stages]
    rollbacks = [entry for entry in read_journal(folder) if entry.get("event") == "rollback"]
    ids = range(len(state.stages) + 1)
    edges += [_edge(e["was"], e["to"], lanes, back=True) for e in rollbacks if e.get("was") in ids and e.get("to") in ids]
    says = "Stages in the order in which they were made, one row per branch. The orange one is current; dashed lines are rollbacks."
    rows = [[f"{s.id} {s.task.name}", str(s.parent), s.origin, s.created, "now" if s.id == state.head else ""] for s in state.stages]
    yield Figure("lineage-chart", "Lineage", says, charts.lineage(stages, edges), ["stage", "after", "how", "made", ""], rows)
    yield Tree(_tree(state))
    for entry in rollbacks:
        yield Text(f"{entry.get('time', '')}: back from stage {entry.get('was')} to stage {entry.get('to')}; nothing was deleted.")


def _lanes(state: State) -> dict[int, int]:
    """A row for each stage: the first child stays in its parent's row, the others begin rows of their own."""
    lanes, parents = {0: 0}, set()
    for stage in state.stages:
        lanes[stage.id] = max(lanes.values()) + 1 if stage.parent in parents else lanes[stage.parent]
        parents.add(stage.parent)
    return lanes


def _edge(start: int, end: int, lanes: Mapping[int, int], *, back: bool) -> dict[str, Any]:
    return {"at": start, "lane": lanes[start], "to_at": end, "to_lane": lanes[end], "back": back}


def _tree(state: State) -> list[Any]:
    def node(number: int, label: str) -> Any:
        children = [node(s.id, f"{s.id} {s.task.name} ({s.origin})") for s in state.stages if s.parent == number]
        return (label, state.head == number, children)

    return [node(0, "0 base")]


def _protected(folder: Path, state: State) -> Iterator[Block]:
    """How far each stage's training has moved the answers of the tasks before it; of the last such stage, layer by layer."""
    rows, last = list[list[str]](), None
    for stage in state.lineage():
        expert = locate_model(folder, stage.expert)
        if expert.is_dir() and (found := protected_by(expert)) is not None and found.moved:
            last = (stage.task.name, found)
            rows += [
                [f"{stage.id} {stage.task.name}", task, f"{share:.3%}", f"{found.strength:.3g}"] for task, share in found.answers.items()
            ]
    if last is None:
        return
    name, found = last
    shares = list(zip(*found.moved.values(), strict=False))
    percent = [[None if share is None else 100 * share**0.5 for share in layer] for layer in shares]
    table = {"experts": list(found.moved), "layers": list(range(len(shares))), "rows": percent}
    says = f"Learning {name}: how far the answers of each earlier task moved, as a share of their size, by its input statistics."
    head = ["stage", "earlier task", "answers moved by", "strength"]
    yield Figure("moved-chart", "Answers moved, by layer", says, merge_charts.lines(table, "moved", "answers moved, %"), head, rows)


def _merge_facts(folder: Path, state: State, stage: Stage, text: bool, cache: Path, progress: Progress) -> MergeFacts:
    """What the page shows of one stage's merge."""
    merged = found_path(folder, stage.merged.path)
    check_record(record := read_json(merged / RECORD), merged, shown=True)
    lineage = {earlier.task.name: earlier for earlier in state.lineage(stage.id)}
    experts: dict[str, Path] = {}
    statistics: dict[str, Path] = {}
    lacking = ""
    for name in (entry["name"] for entry in record["run"]["experts"]):
        learnt = lineage.get(name)
        if learnt is None or (learnt.start == "last" and learnt.parent):
            lacking = f"'{name}' was not fine-tuned from the base, so its delta is not at hand"
        elif not (path := locate_model(folder, learnt.expert)).is_dir():
            lacking = f"the expert '{name}' is missing"
        else:
            experts[name] = path
            if learnt.stats is not None:
                statistics[name] = found_path(folder, learnt.stats)
    tables = {}
    if not lacking:
        base = locate_model(folder, state.base)
        identities = [fingerprint(path) for path in (base, *experts.values())]
        tables = anatomy(merged, Models(base, experts, statistics), cache, progress, identities=identities)
    texts = sample_texts(rows, stage.samples) if text and (rows := unchanged_rows(folder, stage.train)) else {}
    return MergeFacts(record, open_checkpoint(merged).nbytes, tables, lacking, texts)
