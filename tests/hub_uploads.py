"""The endpoints of the Hugging Face hub that a push uses: account, repositories, branches, large files (git LFS) and commits.

What they answer is what huggingface_hub's client of the tested version reads, and what the hub answers to it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import unquote


@dataclass
class Account:
    """Whose token it is. `role` is the token's; `orgs` are organisations with the account's role in them."""

    name: str
    role: str = "write"
    orgs: dict[str, str] = field(default_factory=dict)

    def writes(self, repo: str) -> bool:
        owner = repo.partition("/")[0]
        return self.role == "write" and (owner == self.name or self.orgs.get(owner) in {"write", "admin"})

    def described(self) -> dict[str, Any]:
        orgs = [{"name": name, "roleInOrg": role} for name, role in self.orgs.items()]
        return {"type": "user", "name": self.name, "orgs": orgs, "auth": {"accessToken": {"role": self.role}}}


@dataclass
class Pushable:
    """A repository with history: the folder of each commit, and the head of each branch."""

    place: Path
    private: bool = False
    commits: dict[str, Path] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, changes: dict[str, bytes | None], message: str, branch: str = "main") -> str:
        """Add a commit: new contents by name, None for what is deleted."""
        folder = self.place / str(len(self.commits))
        if branch in self.branches:
            shutil.copytree(self.commits[self.branches[branch]], folder)
        for name, content in changes.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        commit = hashlib.sha1(repr((self.branches.get(branch), len(self.commits), sorted(changes))).encode()).hexdigest()
        self.commits[commit] = folder
        self.branches[branch] = commit
        self.messages.append(message)
        return commit

    def files(self, branch: str = "main") -> dict[str, bytes]:
        folder = self.commits[self.branches[branch]]
        return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@dataclass
class Uploads:
    """The part of the hub that is written to."""

    place: Path = Path()
    pushed: dict[str, Pushable] = field(default_factory=dict)
    accounts: dict[str, Account] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    """Large files that have arrived, by SHA-256."""
    received: list[str] = field(default_factory=list)
    """Their hashes, as often as they came."""
    hidden: set[str] = field(default_factory=set)
    """Repositories that nobody here may see."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Repositories that are called otherwise by now."""
    part: int | None = None
    """Bytes of a part, if large files are to come in parts."""
    storage: Path | None = None
    """A folder that hf_xet's local storage is in, which takes the place of a server."""
    meddle: Callable[[str, str], int | None] = lambda method, path: None
    """Called before each request: a status to answer with instead, or 0 to hang up in the middle of its body."""
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def make(self, repo: str, *, private: bool) -> Pushable:
        """A repository as the hub makes it, with one commit."""
        made = self.pushed[repo] = Pushable(self.place / repo.replace("/", "--") / str(len(self.pushed)), private)
        made.commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, "initial commit")
        return made


class WithUploads:
    """The part of the handler."""

    uploads: Uploads
    command: str
    path: str
    headers: Message
    rfile: Any
    reply: Callable[..., None]
    answer: Callable[[], None]
    close_connection: bool

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    @property
    def account(self) -> Account | None:
        return self.uploads.accounts.get((self.headers["Authorization"] or "").removeprefix("Bearer "))

    def sees(self, repo: str) -> bool:
        found, account, owner = self.uploads.pushed.get(repo), self.account, repo.partition("/")[0]
        if repo in self.uploads.hidden:
            return False
        return found is not None and (not found.private or (account is not None and owner in {account.name, *account.orgs}))

    def answer_account(self, path: str) -> bool:
        """Answer a request of a push; False if it is none."""
        size = int(self.headers["Content-Length"] or 0)
        if (status := self.uploads.meddle(self.command, path)) is not None:
            self.rfile.read(size if status else size // 2)
            self.close_connection = not status
            if status:
                self.reply(status, b'{"error": "meddled with"}')
            return True
        body = self.rfile.read(size)
        if self.command == "PUT":
            return self._receive(path, body)
        routes: list[tuple[str, str, Callable[..., None]]] = [
            ("GET", r"/api/whoami-v2", self._whoami),
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", self._validate),
            ("GET", r"/api/models/(.+?)/auth-check/write", self._check),
            ("GET", r"/api/models/(.+?)/xet-write-token/.+", self._storage),
            ("POST", r"/api/models/(.+?)/preupload/(.+)", self._preupload),
            ("POST", r"/api/models/(.+?)/branch/(.+)", self._branch),
            ("POST", r"/api/models/(.+?)/commit/(.+)", self._commit),
            ("POST", r"/(.+?)\.git/info/lfs/objects/batch", self._batch),
            ("POST", r"/lfs/(\w+)/whole", self._join),
            ("POST", r"/lfs/(\w+)/verify", self._verify),
        ]
        for method, pattern, function in routes:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                function(*map(unquote, match.groups()), *([body] if method == "POST" else []))
                return True
        return False

    def _json(self, status: int, content: Any) -> None:
        self.reply(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _may_write(self, repo: str) -> bool:
        if self.account is None or not self.account.writes(repo):
            self._json(403, {"error": "You don't have the rights to write there"})
            return False
        return True

    def _whoami(self) -> None:
        known = self.account
        if known is None:
            self.reply(401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"})
        else:
            self._json(200, known.described())

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in self.uploads.pushed:
            self._json(409, {"error": "You already created this model repo"})
        elif self._may_write(repo):
            self.uploads.make(repo, private=asked["visibility"] == "private")
            self._json(200, {"url": f"{self.uploads.url}/{repo}"})

    def _validate(self, body: bytes) -> None:
        wrong = "license: nonsense" in json.loads(body)["content"]
        self._json(400 if wrong else 200, {"errors": [{"message": '"license" must be one of [mit]'}] if wrong else [], "warnings": []})

    def _check(self, repo: str) -> None:
        if self._may_write(repo):
            self.reply(200, b"")

    def _preupload(self, repo: str, revision: str, body: bytes) -> None:
        if not self._may_write(repo):
            return
        names = [file["path"] for file in json.loads(body)["files"]]
        modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
        self._json(200, {"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]})

    def _branch(self, repo: str, branch: str, body: bytes) -> None:
        if self._may_write(repo):
            self.uploads.pushed[repo].branches[branch] = json.loads(body)["startingPoint"]
            self._json(200, {})

    def _batch(self, repo: str, body: bytes) -> None:
        if not self._may_write(repo):
            return
        objects = []
        for asked in json.loads(body)["objects"]:
            place = f"{self.uploads.url}/lfs/{asked['oid']}"
            upload: dict[str, Any] = {"href": f"{place}/1"}
            if part := self.uploads.part:
                parts = {str(number): f"{place}/{number}" for number in range(1, -(-asked["size"] // part) + 1)}
                upload = {"href": f"{place}/whole", "header": {"chunk_size": str(part), **parts}}
            known = asked["oid"] in self.uploads.objects
            objects.append(asked if known else {**asked, "actions": {"upload": upload, "verify": {"href": f"{place}/verify"}}})
        self._json(200, {"transfer": "multipart" if self.uploads.part else "basic", "objects": objects})

    def _storage(self, repo: str) -> None:
        if self._may_write(repo):
            self._json(200, {"casUrl": f"local://{self.uploads.storage}", "exp": int(time.time()) + 3600, "accessToken": "of the storage"})

    def _receive(self, path: str, body: bytes) -> bool:
        _, _, oid, number = path.split("/")
        if self.headers["Authorization"]:
            raise AssertionError("a token went to the storage")
        self.uploads.objects[f"{oid}/{number}" if self.uploads.part else oid] = body
        self.uploads.received.append(oid)
        self.reply(200, b"", {"ETag": f'"{number}"'})
        return True

    def _join(self, oid: str, body: bytes) -> None:
        parts = [self.uploads.objects.pop(f"{oid}/{part['partNumber']}") for part in json.loads(body)["parts"]]
        self.uploads.objects[oid] = b"".join(parts)
        self._json(200, {})

    def _verify(self, oid: str, body: bytes) -> None:
        whole = self.uploads.objects.get(oid, b"")
        sound = hashlib.sha256(whole).hexdigest() == oid and len(whole) == json.loads(body)["size"]
        self._json(200 if sound else 400, {})

    def _commit(self, repo: str, branch: str, body: bytes) -> None:
        if not self._may_write(repo):
            return
        (_, header), *lines = [(line["key"], line["value"]) for line in map(json.loads, body.splitlines())]
        pushable = self.uploads.pushed[repo]
        if header.get("parentCommit") != pushable.branches[branch]:
            self._json(412, {"error": "A commit has happened since. Please refresh and try again."})
            return
        changes: dict[str, bytes | None] = {}
        for key, value in lines:
            if key == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                changes[value["path"]] = self.uploads.objects[value["oid"]]
            elif key == "deletedFile":
                changes[value["path"]] = None
        commit = pushable.commit(changes, header["summary"], branch)
        self._json(200, {"success": True, "commitOid": commit, "commitUrl": f"{self.uploads.url}/{repo}/commit/{commit}"})
