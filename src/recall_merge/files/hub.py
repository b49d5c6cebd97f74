"""Where a model's files are: a folder here, or a repository on the Hugging Face hub, of which what a merge needs is fetched.

Weights come as safetensors; the other files that travel with a model (configs, tokenizer, chat template, its own code, which is never run)
come along; weights in other formats stay where they are. Cache, token, endpoint and offline mode are the hub library's own, set by its
environment variables: HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from recall_merge.files.adapter import CONFIG, adapter_weights
from recall_merge.files.checkpoint import weight_files
from recall_merge.files.safetensors import MAX_HEADER, RemoteFile
from recall_merge.runtime.errors import CheckpointError, Fault, RecallError
from recall_merge.runtime.paths import path_of
from recall_merge.runtime.progress import Advance, Progress, Silent

T = TypeVar("T")

COMPANIONS = re.compile(
    r"[^/]+\.(json|jinja|txt|model|tiktoken)|README\.md|LICENSE[^/]*|NOTICE[^/]*|.*\.py|additional_chat_templates/[^/]+\.jinja"
)
FIRST = 100_000  # bytes of a weight file that hold nearly every header
REFERENCE = re.compile(r"(?P<repo>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[^@\s]+))?")
CACHED = re.compile(r".*models--(?P<repo>[^/]+)/snapshots/(?P<revision>[0-9a-f]{40})/?")


@dataclass(frozen=True)
class Located:
    """A model's folder; for a model of the hub also its repository and the commit that its revision means."""

    folder: Path
    repo: str | None = None
    revision: str | None = None
    remote: Mapping[str, RemoteFile] = field(default_factory=dict)
    """Weight files of which only the header was fetched."""

    @property
    def to_download(self) -> int:
        """Bytes of weights that a merge would still have to fetch."""
        return sum(file.size for file in self.remote.values())


@dataclass(frozen=True)
class Reference:
    """A name on the hub: `org/name` or `name`, and perhaps a revision of it (branch, tag or commit)."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision or 'main'}"

    def covers(self, other: object) -> bool:
        """Whether both may mean the same model: the same repository, and no two different revisions."""
        if not isinstance(other, Reference) or self.repo.casefold() != other.repo.casefold():
            return False
        return self.revision is None or other.revision is None or self.revision == other.revision


def locate(reference: str, *, weights: bool = True, progress: Progress | None = None) -> Located:
    """Find a model's files, and fetch those that are not here.

    Args:
        reference: a folder, or `org/name` or `name` on the hub, with `@revision` or without. A folder that exists wins.
        weights: fetch the weights as well; False fetches their headers alone, by ranges of bytes, for files that are not in the cache.
        progress: told of the weights' download, in bytes.

    Where the hub cannot be reached, the cache answers, as far as it goes; the commit that it holds is the one returned.

    Raises:
        CheckpointError: if there is no such model, no access to it, no way to it, or nothing in it that could be merged.
    """
    folder = path_of(reference)
    with suppress(OSError):  # a name that is too long for a folder
        if folder.is_dir():
            return Located(folder)
        if folder.exists():
            raise CheckpointError("this is a file; a model is a folder", where=reference, fix="give the folder that holds it")
    name = parse_reference(reference)
    if name is None:
        raise CheckpointError(
            "there is no such folder", where=reference, fix="check the path, or give a name on the hub: org/name@revision"
        )
    found = _ask(name, lambda: _listing(name))
    if "config.json" not in found.files and CONFIG not in found.files:
        raise CheckpointError(f"'{name.repo}' holds no config.json: it is no model", where=name, fix="check the name")
    pinned = Reference(name.repo, found.commit)
    if found.online and name.revision != found.commit:  # subtle: asked by its name, so that the cache knows what the name means
        config = CONFIG if CONFIG in found.files else "config.json"
        _ask(name, lambda: _download(name, [config], lambda _: None))
    companions = [file for file in found.files if COMPANIONS.fullmatch(file)]
    snapshot = _ask(name, lambda: _download(pinned, companions, lambda _: None))
    wanted = _weights(snapshot, found, name)
    missing = {file: found.files[file] for file in wanted if not (snapshot / file).exists()}
    if not weights:
        remote = {file: _header(pinned, file, size, found.contents[file]) for file, size in missing.items()}
        return Located(snapshot, name.repo, found.commit, remote)
    if missing:
        with (progress or Silent()).stage(f"downloading {name.repo}", sum(missing.values()), "bytes") as advance:
            _ask(name, lambda: _download(pinned, missing, advance))
    return Located(snapshot, name.repo, found.commit)


def parse_reference(reference: str) -> Reference | None:
    """What a text means on the hub; None if it cannot be a name there. A path into the hub's cache means what is cached there.

    >>> parse_reference("org/name@v1.0")
    Reference(repo='org/name', revision='v1.0')
    >>> parse_reference("../org/name") is None
    True
    """
    if match := CACHED.fullmatch(reference):
        return Reference(match["repo"].replace("--", "/", 1), match["revision"])
    match = REFERENCE.fullmatch(reference)
    if match is None or any(part.startswith((".", "-")) or part.endswith((".", "-")) for part in match["repo"].split("/")):
        return None
    return Reference(match["repo"], match["revision"])


def meaning(reference: str, revision: str | None = None) -> Path | Reference | None:
    """What a text means: a folder, where it exists, or else a name on the hub; None if it can be neither."""
    folder = path_of(reference)
    if folder.is_dir() and not CACHED.fullmatch(str(folder.absolute())):
        return folder.resolve()
    name = parse_reference(str(folder.absolute()) if folder.is_dir() else reference)
    return Reference(name.repo, name.revision or revision) if name is not None else None


def cached_folder(reference: Reference) -> Path | None:
    """Where the hub's cache holds a model's config, if it does; asks nobody."""
    from huggingface_hub import try_to_load_from_cache

    for file in ("config.json", CONFIG):
        with suppress(ValueError):  # a name that the hub's library refuses
            path = try_to_load_from_cache(reference.repo, file, revision=reference.revision)
            if isinstance(path, str):
                return Path(path).parent
    return None


@dataclass(frozen=True)
class _Listing:
    """The files of one commit: name -> bytes, and name -> the hash that names its content; from the hub, or from the cache."""

    commit: str
    files: Mapping[str, int]
    contents: Mapping[str, str]
    online: bool = True


def _listing(name: Reference) -> _Listing:
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(name.repo, revision=name.revision, files_metadata=True)
    except Exception as error:  # the transport's errors have no common base of the hub library's
        folder = cached_folder(name) if _unreachable(error) else None
        if folder is None:
            raise
        files = [file for file in folder.rglob("*") if file.is_file()]
        sizes = {str(file.relative_to(folder)): file.stat().st_size for file in files}
        return _Listing(folder.name, sizes, {}, online=False)
    if info.sha is None or info.siblings is None:
        raise OSError("the hub's answer names no commit or no files")
    hashes = {file.rfilename: (file.lfs["sha256"] if file.lfs else file.blob_id) or "" for file in info.siblings}
    return _Listing(info.sha, {file.rfilename: file.size or 0 for file in info.siblings}, hashes)


def _weights(folder: Path, found: _Listing, name: Reference) -> list[str]:
    """The names of the weight files that a merge reads."""
    try:
        return [adapter_weights(found.files, name)] if CONFIG in found.files else weight_files(folder, found.files, name)
    except CheckpointError:
        if found.online:
            raise
    what = f"the hub cannot be reached, and its cache does not hold all weights of '{name.repo}'"
    raise CheckpointError(what, where=name, fix="run once with the network, and without HF_HUB_OFFLINE; or give a folder")


def _download(name: Reference, files: Collection[str], advance: Advance) -> Path:
    """Fetch those files that are not in the cache yet; the folder of the snapshot."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import tqdm

    class Told(tqdm):
        """Draws nothing, and passes on the bytes that reach the disk; the library has a second bar for those on the network."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.on_disk = not str(kwargs.get("name")).endswith(".transfer")
            super().__init__(*args, **(kwargs | {"disable": True}))

        def update(self, n: float | None = 1) -> bool | None:
            if self.on_disk:
                advance(int(n or 0))
            return None

    places = [hf_hub_download(name.repo, file, revision=name.revision, tqdm_class=Told).removesuffix(file) for file in files]
    return Path(places[0])


def _header(name: Reference, file: str, size: int, content: str) -> RemoteFile:
    """The first bytes of a weight file, as far as its header goes."""

    def peek(begin: int, count: int) -> bytes:
        return _ask(name, lambda: _range(name, file, begin, count))

    start = peek(0, min(size, FIRST))
    end = 8 + int.from_bytes(start[:8], "little")
    if len(start) < end <= min(size, 8 + MAX_HEADER):
        start += peek(len(start), end - len(start))
    return RemoteFile(start[:end], size, content, peek)


def _range(name: Reference, file: str, begin: int, count: int) -> bytes:
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(name.repo, file, revision=name.revision)
    headers = build_hf_headers() | {"Range": f"bytes={begin}-{begin + count - 1}", "Accept-Encoding": "identity"}
    found = b""
    with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as answer:
        hf_raise_for_status(answer)
        if begin and answer.status_code != 206:
            raise OSError("the hub sends whole files only, no ranges of them")
        for piece in answer.iter_bytes():  # a server that knows no ranges sends all of the file: hang up when it is enough
            found += piece
            if len(found) >= count:
                break
    return found[:count]


def _ask(name: Reference, question: Callable[[], T]) -> T:
    """Ask the hub's library, and turn what goes wrong into a fault of ours.

    The library's error is not chained: it holds the request, and with it the token.
    """
    try:
        return question()
    except RecallError:
        raise
    except Exception as error:  # the library's own errors, and those of whichever transport it uses
        fault = _fault(error, name)
    raise CheckpointError([fault])


def _unreachable(error: Exception) -> bool:
    """Whether the hub did not answer, rather than answer no."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return isinstance(error, OfflineModeIsEnabled) or type(error).__module__.partition(".")[0].startswith("http")


def _fault(error: Exception, name: Reference) -> Fault:
    from huggingface_hub import constants, errors

    where, log_in = str(name), "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.HfHubHTTPError):
        path = error.response.request.url.path
        where += f" ({path.partition('/resolve/')[2].partition('/')[2]})" if "/resolve/" in path else ""
    match error:
        case errors.GatedRepoError():
            fix = f"accept its terms at {constants.ENDPOINT}/{name.repo}, and {log_in}"
            return Fault(f"access to '{name.repo}' is gated, and this account has none", where, fix)
        case errors.RepositoryNotFoundError():
            what = f"there is no folder '{name.repo}' here and no model of that name on the hub, or it is private"
            return Fault(what, where, f"check the name; for a private model {log_in}")
        case errors.RevisionNotFoundError():
            return Fault(f"'{name.repo}' has no revision '{name.revision}'", where, "give a branch, a tag or a commit of it")
        case errors.HfHubHTTPError() if error.response.status_code in {401, 403}:
            return Fault(f"the hub refuses access to '{name.repo}' (status {error.response.status_code})", where, log_in)
        case errors.HfHubHTTPError() if error.response.status_code == 404:
            return Fault(f"a file of '{name.repo}' is missing on the hub", where, "give another revision")
        case errors.HFValidationError():
            return Fault("there is no such folder, and the hub has no such names", where, "check the path, or give org/name@revision")
        case errors.OfflineModeIsEnabled() | errors.LocalEntryNotFoundError() if constants.HF_HUB_OFFLINE:
            fix = "run once without HF_HUB_OFFLINE, or give a folder"
            return Fault(f"'{name.repo}' is not in the hub's cache, and offline mode is on", where, fix)
        case errors.HfHubHTTPError():
            return Fault(f"the hub answers with status {error.response.status_code}", where, "try again later")
        case OSError() if error.errno is not None and not isinstance(error, ConnectionError):
            return Fault(
                f"the hub's cache cannot be written: {error.strerror}", where, f"make room, or set HF_HOME; it is {constants.HF_HOME}"
            )
        case _ if _unreachable(error) or isinstance(error, errors.LocalEntryNotFoundError | ConnectionError):
            fix = "check the network; what has been downloaded once works without it"
            return Fault(f"the hub at {constants.ENDPOINT} cannot be reached, and '{name.repo}' is not in its cache", where, fix)
    return Fault(f"'{name.repo}' cannot be fetched: {type(error).__name__}", where, "try again, or give a folder")
