"""A hub on this machine: the few endpoints of the Hugging Face hub that fetching a model uses, served over HTTP from folders.

Small files are served in place; weights by a redirect to a second host, as the real hub does, where no token may arrive. The endpoints of a
push are in `hub_uploads.py`.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from huggingface_hub.utils.sha import git_hash

from hub_uploads import Uploads, WithUploads


@dataclass
class Request:
    """What was asked, of which host, with which token, and how many bytes of body went back."""

    method: str
    path: str
    host: str
    token: str | None
    sent: int = 0


@dataclass
class Hub(Uploads):
    """Repositories (name -> folder of files) and what was asked of them."""

    repos: dict[str, Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    knows_ranges: bool = True
    broken: bool = False
    requests: list[Request] = field(default_factory=list)

    def commit(self, repo: str) -> str:
        """The head of a repository; of a mere folder, a hash that changes with the names and sizes of the files."""
        if repo in self.pushed:
            return self.pushed[repo].branches["main"]
        files = sorted((str(file.relative_to(self.repos[repo])), file.stat().st_size) for file in _files(self.repos[repo]))
        return hashlib.sha1(repr((repo, files)).encode()).hexdigest()

    def find(self, repo: str, revision: str) -> tuple[str, Path] | None:
        """The commit that a revision means, and the folder of its files."""
        if (pushed := self.pushed.get(repo)) is not None:
            commit = pushed.branches.get(revision, revision)
            return (commit, pushed.commits[commit]) if commit in pushed.commits else None
        commit = self.commit(repo)
        return (commit, self.repos[repo]) if revision in {"main", "v1", commit} else None

    def sent(self, pattern: str = "") -> int:
        """Bytes of bodies sent for paths that match."""
        return sum(request.sent for request in self.requests if re.search(pattern, request.path))

    def asked(self, pattern: str) -> list[Request]:
        return [request for request in self.requests if re.search(pattern, request.path)]


@contextmanager
def serve() -> Iterator[Hub]:
    """A running hub, empty at first."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(WithUploads, BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        uploads = hub

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            self.request_record = Request(self.command, self.path, self.headers["Host"] or "", self.headers["Authorization"])
            hub.requests.append(self.request_record)
            if hub.broken:
                self.reply(503, b"")
            elif self.answer_account(path):
                pass
            elif match := re.fullmatch(r"/api/models/(?P<repo>[^/]+(/(?!revision/)[^/]+)?)(/revision/(?P<revision>.+))?", path):
                self.info(match["repo"], match["revision"] or "main")
            elif match := re.fullmatch(r"/(?P<repo>.+?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", path):
                self.resolve(match["repo"], match["revision"], match["file"])
            elif match := re.fullmatch(r"/cdn/(?P<repo>.+?)/-/(?P<commit>[^/]+)/(?P<file>.+)", path):
                found = hub.find(match["repo"], match["commit"])
                self.send_file(found[1] / match["file"], {}) if found else self.reply(404, b"")
            else:
                self.reply(404, b"")

        def known(self, repo: str, revision: str) -> tuple[str, Path] | None:
            if repo not in hub.repos and not self.sees(repo):
                self.reply(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
                return None
            if (found := hub.find(repo, revision)) is None:
                self.reply(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"})
            return found

        def info(self, repo: str, revision: str) -> None:
            if (found := self.known(repo, revision)) is None:
                return
            siblings, (commit, folder) = [], found
            for file in _files(folder):
                entry = {"rfilename": str(file.relative_to(folder)), "size": file.stat().st_size, "blobId": git_hash(file.read_bytes())}
                if file.suffix == ".safetensors":
                    entry["lfs"] = {"sha256": _sha256(file), "size": file.stat().st_size, "pointerSize": 130}
                siblings.append(entry)
            private = repo in hub.pushed and hub.pushed[repo].private
            answer = {"id": hub.renamed.get(repo, repo), "sha": commit, "private": private, "siblings": siblings}
            self.reply(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

        def resolve(self, repo: str, revision: str, file: str) -> None:
            if (found := self.known(repo, revision)) is None:
                return
            if repo in hub.gated:
                code = 403 if self.headers["Authorization"] else 401
                self.reply(code, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted."})
                return
            commit, folder = found
            path, headers = folder / file, {"X-Repo-Commit": commit}
            if not path.is_file():
                self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", **headers})
                return
            if path.suffix == ".safetensors":
                headers |= {"X-Linked-Etag": f'"{_sha256(path)}"', "X-Linked-Size": str(path.stat().st_size)}
                self.reply(302, b"", headers | {"Location": f"http://localhost:{hub.port}/cdn/{repo}/-/{commit}/{file}"})
                return
            self.send_file(path, headers | {"ETag": f'"{git_hash(path.read_bytes())}"'})

        def send_file(self, path: Path, headers: dict[str, str]) -> None:
            data = path.read_bytes()
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
            if wanted is None or not hub.knows_ranges:
                self.reply(200, data, headers)
                return
            begin, end = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
            self.reply(206, data[begin : end + 1], headers | {"Content-Range": f"bytes {begin}-{end}/{len(data)}"})

        def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                try:
                    self.wfile.write(body)
                    self.request_record.sent = len(body)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

    return Handler
