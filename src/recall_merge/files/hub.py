"""The files of a model: in a folder, or in a repository of the Hugging Face hub, from which those that a merge needs are fetched.

These are the weights as safetensors and the small files (configs, tokenizer, chat template, input statistics, code, which is never run),
not weights in other formats. Cache, token, endpoint and offline mode are those of the hub library, set by HF_HOME, HF_HUB_CACHE, HF_TOKEN,
HF_ENDPOINT and HF_HUB_OFFLINE.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from recall_merge.files.adapter import CONFIG, adapter_weights
from recall_merge.files.checkpoint import ADAPTER, weight_files
from recall_merge.files.safetensors import MAX_HEADER, RemoteFile
from recall_merge.runtime.errors import CheckpointError, Fault, RecallError
from recall_merge.runtime.paths import path_of
from recall_merge.runtime.progress import Advance, Progress, Silent

T = TypeVar("T")

COMPANIONS = re.compile(
    r"[^/]+\.(json|jinja|txt|model|tiktoken)|stats\.safetensors|README\.md|LICENSE[^/]*|NOTICE[^/]*|.*\.py|"
    r"additional_chat_templates/[^/]+\.jinja"
)
FIRST = 100_000  # bytes of a weight file; nearly every header fits
REFERENCE = re.compile(r"(?P<repo>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[^@\s]+))?")
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
CACHED = re.compile(r".*models--(?P<repo>[^/]+)/snapshots/(?P<revision>[0-9a-f]{40})/?")


@dataclass(frozen=True)
class Located:
    """A model's folder; for a model of the hub also its repository and the commit of its revision."""

    folder: Path
    repo: str | None = None
    revision: str | None = None
    remote: Mapping[str, RemoteFile] = field(default_factory=dict)
    """Weight files whose headers alone were fetched."""

    @property
    def to_download(self) -> int:
        """Bytes of weights that are still to be fetched."""
        return sum(file.size for file in self.remote.values())


@dataclass(frozen=True)
class Reference:
    """A name on the hub: `org/name` or `name`, with or without a revision (branch, tag or commit)."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision or 'main'}"

    def covers(self, other: object) -> bool:
        """Whether both may mean the same model: the same repository, and not two different revisions."""
        if not isinstance(other, Reference) or self.repo.casefold() != other.repo.casefold():
            return False
        return self.revision is None or other.revision is None or self.revision == other.revision


def locate(reference: str, *, weights: bool = True, progress: Progress | None = None) -> Located:
    """Find a model's files, and fetch missing ones. If the hub cannot be reached, the cache is used.

    Args:
        reference: a folder, or `org/name` or `name` on the hub, with or without `@revision`. A folder that exists wins.
        weights: fetch the weights as well; if False, only the headers of weight files that are not in the cache, by byte ranges.
        progress: of the download of the weights, in bytes.

    Raises CheckpointError if the model does not exist, cannot be accessed or reached, or holds nothing that can be merged.
    """
    folder = path_of(reference)
    with suppress(OSError):  # a name that is too long for a folder
        if folder.is_dir():
            return Located(folder)
        if folder.exists():
            raise CheckpointError("this is a file; a model is a folder", where=reference, fix="give the folder that holds it")
    name = parse_reference(reference)
    if name is None:
        fix = "check the path, or give a name on the hub: org/name@revision"
        raise CheckpointError("there is no such folder", where=reference, fix=fix)
    listing = _ask(name, lambda: _list_files(name))
    if "config.json" not in listing.files and CONFIG not in listing.files:
        lacks = "weights of an adapter, but no adapter_config.json" if ADAPTER in listing.files else "no config.json, so it is not a model"
        raise CheckpointError(f"'{name.repo}' holds {lacks}", where=name, fix="check the name")
    pinned = Reference(name.repo, listing.commit)
    if listing.online and name.revision != listing.commit:  # subtle: fetched by its name, so that the cache knows the name's commit
        _ask(name, lambda: _download(name, [CONFIG if CONFIG in listing.files else "config.json"], lambda _: None))
    snapshot = _ask(name, lambda: _download(pinned, [*filter(COMPANIONS.fullmatch, listing.files)], lambda _: None))
    wanted = _weights(snapshot, listing, name)
    missing = {file: listing.files[file] for file in wanted if not (snapshot / file).exists()}
    if not weights:
        remote = {file: _header(pinned, file, size, listing.contents[file]) for file, size in missing.items()}
        return Located(snapshot, name.repo, listing.commit, remote)
    if missing:
        with (progress or Silent()).stage(f"downloading {name.repo}", sum(missing.values()), "bytes") as advance:
            _ask(name, lambda: _download(pinned, missing, advance))
    return Located(snapshot, name.repo, listing.commit)


def parse_reference(reference: str) -> Reference | None:
    """The hub name in a text; None if it cannot be one. A path into the hub's cache means the model that is cached there.

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
    """A text as a folder, if it exists, or as a name on the hub; None if it can be neither."""
    folder = path_of(reference)
    if folder.is_dir() and not CACHED.fullmatch(str(folder.absolute())):
        return folder.resolve()
    name = parse_reference(str(folder.absolute()) if folder.is_dir() else reference)
    return Reference(name.repo, name.revision or revision) if name is not None else None


def cached_folder(reference: Reference) -> Path | None:
    """The folder of a model in the hub's cache, if its config is there; the hub is not asked."""
    from huggingface_hub import try_to_load_from_cache

    with suppress(ValueError):  # a name that the hub library refuses
        paths = (try_to_load_from_cache(reference.repo, file, revision=reference.revision) for file in ("config.json", CONFIG))
        return next((Path(path).parent for path in paths if isinstance(path, str)), None)
    return None


@dataclass(frozen=True)
class _Listing:
    """The files of one commit, with their sizes and the hashes of their contents; from the hub, or from the cache."""

    commit: str
    files: Mapping[str, int]
    contents: Mapping[str, str]
    online: bool = True


def _list_files(name: Reference) -> _Listing:
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(name.repo, revision=name.revision, files_metadata=True)
    except Exception as error:  # the transport's errors have no common base class in the hub library
        folder = cached_folder(name) if unreachable(error) else None
        if folder is None:
            raise
        sizes = {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
        return _Listing(folder.name, sizes, {}, online=False)
    if info.sha is None or info.siblings is None:
        raise OSError("the hub's answer names no commit or no files")
    hashes = {file.rfilename: (file.lfs["sha256"] if file.lfs else file.blob_id) or "" for file in info.siblings}
    return _Listing(info.sha, {file.rfilename: file.size or 0 for file in info.siblings}, hashes)


def _weights(folder: Path, listing: _Listing, name: Reference) -> list[str]:
    """Names of the weight files that a merge reads."""
    try:
        return [adapter_weights(listing.files, name)] if CONFIG in listing.files else weight_files(folder, listing.files, name)
    except CheckpointError:
        if listing.online:
            raise
    what = f"the hub cannot be reached, and its cache does not hold all weights of '{name.repo}'"
    raise CheckpointError(what, where=name, fix="run once with the network, and without HF_HUB_OFFLINE; or give a folder")


def _download(name: Reference, files: Collection[str], advance: Advance) -> Path:
    """Fetch files that are not in the cache yet; returns the folder of the snapshot."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import tqdm

    class DiskBytes(tqdm):
        """Draws nothing, and reports the bytes written to disk; the library has a second bar for those on the network."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.on_disk = not str(kwargs.get("name")).endswith(".transfer")
            super().__init__(*args, **(kwargs | {"disable": True}))

        def update(self, n: float | None = 1) -> bool | None:
            if self.on_disk:
                advance(int(n or 0))
            return None

    folders = [hf_hub_download(name.repo, file, revision=name.revision, tqdm_class=DiskBytes).removesuffix(file) for file in files]
    return Path(folders[0])


def _header(name: Reference, file: str, size: int, content: str) -> RemoteFile:
    """The first bytes of a weight file, up to the end of its header."""

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
    data = b""
    with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as answer:
        hf_raise_for_status(answer)
        if begin and answer.status_code != 206:
            raise OSError("the hub sends whole files only, no ranges of them")
        for piece in answer.iter_bytes():  # a server without ranges sends the whole file: stop after `count` bytes
            data += piece
            if len(data) >= count:
                break
    return data[:count]


def ask(question: Callable[[], T], explain: Callable[[Exception], Fault], kind: type[RecallError] = CheckpointError) -> T:
    """Call the hub library, and turn its errors into ours. They are not chained: they hold the request, and with it the token."""
    try:
        return question()
    except RecallError:
        raise
    except Exception as error:  # the library's own errors, and those of whichever transport it uses
        fault = explain(error)
    raise kind([fault])


def _ask(name: Reference, question: Callable[[], T]) -> T:
    return ask(question, lambda error: _fault(error, name))


def unreachable(error: Exception) -> bool:
    """Whether the hub did not answer, as opposed to refusing."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return isinstance(error, OfflineModeIsEnabled) or type(error).__module__.partition(".")[0].startswith("http")


def _fault(error: Exception, name: Reference) -> Fault:
    from huggingface_hub import constants, errors

    where, log_in = str(name), LOG_IN
    absent = isinstance(error, errors.RepositoryNotFoundError | errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError)
    place = Path(name.repo)
    if (absent or isinstance(error, ConnectionError) or unreachable(error)) and place.parent.is_dir():
        near = get_close_matches(place.name, [folder.name for folder in place.parent.iterdir() if folder.is_dir()], n=1)
        if near or place.parent != Path():
            fix = f"did you mean '{place.parent / near[0]}'?" if near else "check the path, or give a name on the hub: org/name@revision"
            return Fault("there is no such folder", name.repo, fix)
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
            fix = "check the path; for a model of the hub run once without HF_HUB_OFFLINE"
            return Fault(f"there is no such folder, '{name.repo}' is not in the hub's cache, and offline mode is on", where, fix)
        case errors.HfHubHTTPError():
            return Fault(f"the hub answers with status {error.response.status_code}", where, "try again later")
        case OSError() if error.errno is not None and not isinstance(error, ConnectionError):
            fix = f"make room, or set HF_HOME; it is {constants.HF_HOME}"
            return Fault(f"the hub's cache cannot be written: {error.strerror}", where, fix)
        case _ if unreachable(error) or isinstance(error, errors.LocalEntryNotFoundError | ConnectionError):
            what = (
                f"there is no such folder, '{name.repo}' is not in the hub's cache, and the hub at {constants.ENDPOINT} cannot be reached"
            )
            return Fault(what, where, "check the path; for a model of the hub, the network: what has been downloaded once works without it")
    return Fault(f"'{name.repo}' cannot be fetched: {type(error).__name__}", where, "try again, or give a folder")
