"""A repository on the hub that a result goes to: what stands in it, who may write to it, and how files get there, in one commit.

Weights are sent one file after the other, before the commit that makes them visible. Meanwhile the hub keeps what has arrived, under its
hash: whole files or, with the package `hf_xet`, pieces of files. So the same push, later, sends only what is missing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeVar

from recall_merge.files.hub import LOG_IN, ask, unreachable
from recall_merge.files.record import LATER, RECORD, read_record
from recall_merge.interop.outgoing import Content, size
from recall_merge.runtime.errors import Fault, OutputError, ResultError, short
from recall_merge.runtime.progress import Progress
from recall_merge.runtime.quiet import quiet_hub

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi
    from huggingface_hub.hf_api import RepoSibling

T = TypeVar("T")
WEIGHTS = ".safetensors"
SAME_COMMAND = "run the same command again: what has arrived is not sent again"
WRITE_TOKEN = "give a token that may write: https://huggingface.co/settings/tokens"


@dataclass(frozen=True)
class Standing:
    """What stands in a repository.

    Attributes:
        head: the commit that a push follows: the branch's head, or that of `main` where there is no such branch yet.
        files: by name.
        ours: names that a record of ours lists, with those of the record itself and of what comes to a result later.
    """

    head: str
    private: bool
    has_branch: bool
    files: Mapping[str, RepoSibling]
    ours: frozenset[str]


@dataclass(frozen=True)
class Repository:
    """A name on the hub, and a branch. Every method raises OutputError for what the hub refuses, and if it cannot be reached."""

    name: str
    branch: str

    def __str__(self) -> str:
        return f"{self.name}@{self.branch}"

    def check_account(self) -> None:
        """Raises OutputError unless there is a token that may write under this name, as far as the hub tells beforehand."""
        from huggingface_hub import get_token

        if get_token() is None:
            raise OutputError("there is no token of the hub", where=str(self), fix=LOG_IN)
        account = self._ask(lambda api: api.whoami())
        role = account.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise OutputError("the token may only read", where=str(self), fix=WRITE_TOKEN)
        (owner, _, name), mine = self.name.partition("/"), account["name"]
        if role != "write" or owner.casefold() == mine.casefold():
            return  # subtle: a fine-grained token need not list organisations; the hub refuses it before anything is sent
        right = {group["name"].casefold(): group.get("roleInOrg") for group in account.get("orgs", ())}.get(owner.casefold(), "none")
        if right in ("none", "read"):
            what = f"the account '{mine}' " + (f"is no member of '{owner}'" if right == "none" else f"may only read in '{owner}'")
            raise OutputError(what, where=str(self), fix=f"ask the owners of '{owner}', or push to {mine}/{name}")

    def check_card(self, card: bytes) -> None:
        """Raises OutputError with what the hub finds wrong in the metadata of a model card."""
        from huggingface_hub import ModelCard

        def validate(api: HfApi) -> None:
            try:
                ModelCard(card.decode()).validate()
            except ValueError as error:
                words = str(error)
                with suppress(ValueError, KeyError, TypeError):
                    words = "; ".join(fault["message"] for fault in json.loads(words)["errors"])
                fix = "change the metadata at the start of README.md"
                raise OutputError(f"the hub refuses the model card: {short(words)[1:-1]}", where=str(self), fix=fix) from None

        self._ask(validate)

    def address(self, commit: str) -> str:
        """Where people see a commit."""
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{self.name}/commit/{commit}"

    def look(self) -> Standing | None:
        """What stands there; None if there is no such repository. OutputError if this account may not write to it."""

        def look(api: HfApi) -> Standing | None:
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

            has_branch = True
            try:
                info = api.model_info(self.name, revision=self.branch, files_metadata=True)
            except RevisionNotFoundError:
                has_branch, info = False, api.model_info(self.name, files_metadata=True)
            except RepositoryNotFoundError as error:
                if isinstance(error, GatedRepoError):
                    raise
                return None
            assert info.sha is not None
            if info.id != self.name:
                raise OutputError(f"the repository's name is '{info.id}'", where=str(self), fix=f"give {info.id}")
            api.auth_check(self.name, write=True)
            files = {file.rfilename: file for file in info.siblings or ()}
            ours: Collection[str] = ()
            if RECORD in files:
                with TemporaryDirectory() as place, suppress(ResultError):
                    hf_hub_download(self.name, RECORD, revision=info.sha, local_dir=place)
                    ours = {*read_record(Path(place))["files"], *LATER}
            return Standing(info.sha, bool(info.private), has_branch, files, frozenset(ours))

        return self._ask(look)

    def make(self, *, private: bool) -> Standing:
        """Make the repository, and look at it."""
        self._ask(lambda api: api.create_repo(self.name, private=private))
        if (made := self.look()) is None:
            raise OutputError("the hub does not show the repository that it has just made", where=str(self), fix=SAME_COMMAND)
        return made

    def make_branch(self, head: str) -> None:
        """Make the branch, at a commit."""
        self._ask(lambda api: api.create_branch(self.name, branch=self.branch, revision=head))

    def commit(
        self,
        files: Mapping[str, Content],
        deleted: Collection[str],
        *,
        head: str,
        message: str,
        check: Callable[[], None],
        progress: Progress,
    ) -> CommitInfo:
        """Send files, and make one commit of them and of what is deleted. OutputError if `head` is not the branch's head any more.

        `check` is called once weights have arrived, before the commit.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        additions = {name: CommitOperationAdd(name, content) for name, content in files.items()}
        operations = [*additions.values(), *(CommitOperationDelete(name, is_folder=False) for name in deleted)]
        sizes = {name: size(content) for name, content in files.items()}

        def send(file: str) -> None:
            self._ask(lambda api: api.preupload_lfs_files(self.name, [additions[file]], revision=self.branch), file)

        def commit(api: HfApi) -> CommitInfo:
            return api.create_commit(self.name, operations, commit_message=message, revision=self.branch, parent_commit=head)

        with progress.stage(f"uploading to {self.name}", sum(sizes.values()), "bytes") as advance:
            for name in (name for name in files if name.endswith(WEIGHTS)):
                send(name)
                advance(sizes.pop(name))
            check()
            made = self._ask(commit)
            advance(sum(sizes.values()))
        return made

    def _ask(self, question: Callable[[HfApi], T], file: str = "") -> T:
        from huggingface_hub import HfApi

        with quiet_hub():
            return ask(lambda: question(HfApi()), partial(self._explain, file=file), OutputError)

    def _explain(self, error: Exception, file: str) -> Fault:
        from huggingface_hub import constants, errors

        while type(error) is RuntimeError and isinstance(error.__cause__, Exception):  # the library's own, around what it met
            error = error.__cause__
        where = f"{self} ({file})" if file else str(self)
        status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
        if isinstance(error, PermissionError):  # of hf_xet, which tells other statuses only in words
            status = 403
        elif found := re.search(r"HTTP status \w+ error \((\d{3}) ", str(error)):
            status = int(found[1])
        match status:
            case 401 if not isinstance(error, errors.RepositoryNotFoundError):
                return Fault("the hub does not accept the token", where, LOG_IN)
            case 403:
                return Fault(f"the token may not write to '{self.name}'", where, f"{WRITE_TOKEN}; or ask its owners")
            case 401 | 404:
                return Fault(f"there is no '{self}' on the hub any more, or this account may not see it", where, "check the name")
            case 409:
                what = f"the name '{self.name}' is taken by a repository that this account may not see, or that has just been made"
                return Fault(what, where, "give another name, or run the same command again")
            case 412:
                return Fault("somebody else has pushed there meanwhile", where, f"look at what is there, and {SAME_COMMAND}")
            case 429:
                return Fault("the hub takes no more requests for now (status 429)", where, f"wait some minutes, and {SAME_COMMAND}")
            case int() if status < 500:
                words = getattr(error, "server_message", None) or f"status {status}"
                return Fault(f"the hub refuses: {short(words)[1:-1]}", where, "do what it says, and run the same command again")
            case int():
                return Fault(f"the hub answers with status {status}", where, f"try again later; {SAME_COMMAND}")
        if isinstance(error, ConnectionError | TimeoutError) or unreachable(error):
            return Fault(f"the network to the hub at {constants.ENDPOINT} is lost", where, SAME_COMMAND)
        if isinstance(error, OSError) and error.errno is not None:
            return Fault(f"the system reports: {error.strerror}", str(error.filename or where), SAME_COMMAND)
        return Fault(f"the upload failed: {type(error).__name__}", where, SAME_COMMAND)
