"""`recall push`: a verified result and its model card to a repository of the Hugging Face hub, in one commit."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recall_merge.files.hashing import hash_file
from recall_merge.files.hub import parse_reference
from recall_merge.files.model_card import MODEL_CARD
from recall_merge.files.record import is_read_by_loaders, versions
from recall_merge.interop.outgoing import Content, Outgoing, collect, read, size
from recall_merge.interop.repository import Repository, Standing
from recall_merge.runtime.errors import Fault, Faults, OutputError, short
from recall_merge.runtime.progress import Progress, Silent

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

MAIN = "main"
INITIAL = (".gitattributes", MODEL_CARD)  # what the hub puts into a new repository
IGNORING = ".gitignore"  # the hub leaves out of a commit what it names


@dataclass(frozen=True)
class Pushed:
    """What a push did, or, as a dry run, would do."""

    repo: str
    revision: str
    """The branch."""
    commit: str | None
    """The commit that holds the result; None after a dry run of a push that would make one."""
    url: str | None
    """Its address."""
    files: tuple[str, ...]
    """New and changed ones."""
    bytes: int
    """Their size. What the hub has already is not sent."""
    deleted: tuple[str, ...]
    """Files of an earlier result that this one lacks."""
    private: bool
    created: bool
    """The repository is new."""
    dry_run: bool
    notes: tuple[str, ...]
    """What a reader should know."""

    @property
    def changes(self) -> bool:
        """Whether there was anything to commit."""
        return bool(self.files or self.deleted)


def push(
    result: Path | str,
    repo: str,
    *,
    public: bool = False,
    revision: str = MAIN,
    message: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Pushed:
    """Upload a result or an expert that matches its record. The repository never shows a part of it.

    Files of an earlier result that this one lacks are deleted in the same commit. A push that would change nothing makes no commit. After a
    stop, the same call goes on. Token and endpoint are those of the hub library.

    Args:
        repo: `org/name`; it is made if it is not there.
        public: make a new repository public, and accept one that is. The visibility of one that is there never changes.
        revision: the branch; it is made if it is not there, from `main`.
        message: of the commit.
        license: goes into the model card; the folder's own stays as it is.
        base_model: likewise: the base's name on the hub. An adapter's config gets it too.
        overwrite: accept a repository with files that no record of ours names. Those of the same names are replaced, none is deleted.
        dry_run: ask the hub, change nothing.

    Raises:
        RecallError: with every fault of folder, card, name, token and repository, before anything is sent; or with what went wrong later.
    """
    faults, target, found = Faults(), Repository(repo, revision), None
    outgoing = faults.attempt(collect, Path(result), license=license, base_model=base_model)
    faults.extend(unaskable := [*_unaskable(repo)])
    with faults.collect():
        if not unaskable:
            target.check_account()
            found = target.look()
            faults.extend(_refusals(target, found, outgoing, public=public, overwrite=overwrite))
            if outgoing is not None:
                target.check_card(read(outgoing.files[MODEL_CARD]))
    faults.raise_any()
    assert outgoing is not None
    standing = found
    if found is None and not dry_run:
        standing = target.make(private=not public)
        faults.extend(_refusals(target, standing, outgoing, public=public, overwrite=overwrite))  # whatever the hub made of it
        faults.raise_any(OutputError)
    stored = standing.files if standing is not None else {}
    changed = {name: content for name, content in outgoing.files.items() if not _same(content, stored.get(name))}
    deleted = sorted(standing.ours & set(stored) - set(outgoing.files)) if standing is not None else []
    commit = url = None
    if standing is not None and not dry_run and not standing.has_branch:
        target.make_branch(standing.head)
    if standing is not None and not (changed or deleted):
        commit, url = standing.head, target.address(standing.head)
    elif standing is not None and not dry_run:
        message, check = message or _message(outgoing), outgoing.states.check
        made = target.commit(changed, deleted, head=standing.head, message=message, check=check, progress=progress or Silent())
        commit, url = made.oid, made.commit_url
    return Pushed(
        *(repo, revision, commit, url),
        files=tuple(changed),
        bytes=sum(map(size, changed.values())),
        deleted=tuple(deleted),
        private=standing.private if standing is not None else not public,
        created=found is None,
        dry_run=dry_run,
        notes=tuple(_notes(standing, outgoing, public=public)),
    )


def _unaskable(repo: str) -> Iterator[Fault]:
    """Why the hub cannot be asked about a name."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    reference, fix = parse_reference(repo), "give org/name; a branch goes to --revision"
    try:
        validate_repo_id(reference.repo if reference else repo)
    except HFValidationError:
        reference = None
    if reference is None or reference.revision is not None or "/" not in reference.repo:
        yield Fault(f"'{repo}' is not a name of the form org/name", "", fix)
    if constants.is_offline_mode():
        yield Fault("offline mode is on: nothing can be pushed", "HF_HUB_OFFLINE", "take HF_HUB_OFFLINE out of the environment")


def _refusals(target: Repository, found: Standing | None, outgoing: Outgoing | None, *, public: bool, overwrite: bool) -> Iterator[Fault]:
    """Why a push must not go to what stands there."""
    if found is None:
        return
    if not found.private and not public:
        fix = "give --public; or make it private in its settings on the hub, and push again"
        yield Fault(f"'{target.name}' is public: everybody would see the result", str(target), fix)
    others = _others(found)
    if others and not overwrite:
        fix = "--overwrite keeps them, but for files of the same names; or give another repository or branch"
        yield Fault(f"there are files that no record of ours names: {_some(others)}", str(target), fix)
    elif outgoing is not None:
        stray = [name for name in others if name not in outgoing.files and (is_read_by_loaders(name) or name == IGNORING)]
        if stray:
            what = f"{_some(stray)} would spoil the result: loaders take them for the model, or the hub leaves out what they name"
            words = shlex.join(["hf", "repos", "delete-files", target.name, *stray, "--revision", target.branch])
            yield Fault(what, str(target), f"delete them there: {words}")


def _others(found: Standing) -> list[str]:
    """The files there that are neither ours nor the hub's."""
    return sorted(set(found.files) - found.ours - set(INITIAL))


def _some(names: list[str]) -> str:
    return ", ".join(map(short, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _same(content: Content, stored: RepoSibling | None) -> bool:
    """Whether the hub holds this content: by SHA-256 for large files, by git's hash for others."""
    if stored is None or stored.size != size(content):
        return False
    if stored.lfs is not None:
        return stored.lfs.sha256 == (hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else hash_file(content))
    data = read(content)
    return stored.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _message(outgoing: Outgoing) -> str:
    method = outgoing.record.get("method")
    what = f"Merge by {method['name']}" if isinstance(method, Mapping) and "name" in method else "Fine-tuned expert"
    return f"{what} (recall-merge {versions()['recall-merge']})"


def _notes(standing: Standing | None, outgoing: Outgoing, *, public: bool) -> Iterator[str]:
    if outgoing.left:
        yield f"stays here, as the record does not name it: {_some([*outgoing.left])}"
    if standing is not None and standing.private and public:
        yield "the repository stays private, as it was: its settings on the hub change that"
    if standing is not None and (kept := [name for name in _others(standing) if name not in outgoing.files]):
        yield f"stays there, as no record of ours names it: {_some(kept)}"
