"""Models and datasets from the Hugging Face hub, safetensors and rows only, at a resolved commit; results to it.

`huggingface_hub` names each download by the commit that a revision stands for at its start, resumes a
file whose connection breaks, and keeps every complete file. Added here: a time limit, further
attempts where it gives up, and messages that say what to do.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    constants,
    get_token,
    hf_hub_download,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from honeloom.errors import ConfigError, HubError, NotCachedError, SourceError
from honeloom.runs.redact import redact

__all__ = ["check_push", "check_repository", "describe_hub", "fetch_config", "fetch_dataset", "fetch_model", "push"]

MODEL_PATTERNS = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.model",
    "merges.txt",
    "vocab.txt",
    "*/merges.txt",
    "*/vocab.txt",
    "*.jinja",
    "README.md",
]
ROW_PATTERNS = [
    f"*{ending}{packed}" for ending in (".jsonl", ".json", ".csv", ".tsv") for packed in ("", ".gz", ".zst")
]
ROW_PATTERNS += ["*.parquet", "*.arrow", "README.md"]
WAITS = (1.0, 2.0, 4.0)
"""Seconds before each further attempt."""
ANSWER_SECONDS = 10.0
"""How long the hub may take to answer the first question."""
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")
_BUSY = {408, 425, 429, 500, 502, 503, 504}
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# huggingface_hub 1 builds on httpx and 2 on httpx2; the names of their exceptions are the same.
_http: Any = sys.modules[HfHubHTTPError.__bases__[0].__module__.partition(".")[0]]
_UNREACHABLE = (_http.ConnectError, _http.ConnectTimeout, _http.ProxyError)

T = TypeVar("T")


class _WithoutSecrets(logging.Filter):
    """Takes tokens and the queries of signed addresses out of what huggingface_hub logs while it tries again."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(re.sub(r"\?[^\s'\"]+", "?[...]", record.getMessage())), ()
        return True


for _handler in logging.getLogger("huggingface_hub").handlers:
    _handler.addFilter(_WithoutSecrets())


def fetch_model(name: str, *, fetch: bool = True) -> tuple[Path, str]:
    """Return the local snapshot and commit of `org/name[@revision]`.

    Parameters
    ----------
    name : str
        Hub id, optionally with a revision.
    fetch : bool
        Whether it may be downloaded.

    Raises
    ------
    NotCachedError
        Not in the cache and `fetch` is false.
    SourceError
        Not found, gated, offline, or without safetensors; the message names repository and file.
    HubError
        The hub kept failing while it answered.
    """
    path = _snapshot(name, "model", MODEL_PATTERNS, fetch)
    if not any(path.glob("*.safetensors")):
        raise SourceError(f"{name}: the repository has no safetensors file; pickled weights are not read")
    return path, path.name


def fetch_config(name: str) -> Path:
    """Return a folder with config.json of `org/name[@revision]`, cached or fetched; nothing else need be in it.

    Raises
    ------
    SourceError, HubError
        As `fetch_model`, and where there is no config.json.
    """
    repository, _, revision = name.partition("@")

    def download() -> str:
        here = try_to_load_from_cache(repository, "config.json", revision=revision or None)
        if not isinstance(here, str) and not constants.HF_HUB_OFFLINE:
            # Of a file that is not in the cache it would ask a hub that does not answer for a minute.
            HfApi().repo_info(repository, revision=revision or None, timeout=ANSWER_SECONDS)
        return str(hf_hub_download(repository, "config.json", revision=revision or None, etag_timeout=ANSWER_SECONDS))

    try:
        return Path(_repeated(download)).parent
    except RemoteEntryNotFoundError:
        raise SourceError(f"model {name}: the repository has no config.json; download it to see what it is") from None
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, _http.TransportError, OSError) as error:
        if constants.HF_HUB_OFFLINE or isinstance(error, _UNREACHABLE) or isinstance(error.__cause__, _UNREACHABLE):
            raise SourceError(_absent(name, "model", "config.json is")) from None
        raise _fitting(error, "model", name) from None


def fetch_dataset(name: str, *, fetch: bool = True) -> tuple[Path, str]:
    """Return the local snapshot and commit of a dataset repository; raises as `fetch_model`."""
    path = _snapshot(name, "dataset", ROW_PATTERNS, fetch)
    return path, path.name


def _snapshot(name: str, kind: str, patterns: list[str], fetch: bool) -> Path:
    repository, _, revision = name.partition("@")
    arguments: dict[str, Any] = {"repo_type": kind, "revision": revision or None, "allow_patterns": patterns}
    try:
        if not fetch or constants.HF_HUB_OFFLINE or _COMMIT.fullmatch(revision):
            found = _cached(repository, arguments)
            if found is not None:
                return found
        if fetch and not constants.HF_HUB_OFFLINE:
            return _repeated(lambda: _download(repository, revision, arguments))
    except _UNREACHABLE:
        if (found := _cached(repository, arguments)) is not None:
            return found
    except (HfHubHTTPError, HFValidationError, _http.TransportError, LocalEntryNotFoundError, OSError) as error:
        if _passes(error) and (found := _cached(repository, arguments)) is not None:
            return found
        raise _fitting(error, kind, name) from None
    if not fetch:
        raise NotCachedError(f"{kind} {name} is not in the cache")
    sought = "its row files are" if kind == "dataset" else "its weights are"
    if kind == "model" and _find_snapshot(repository, arguments) is None:
        sought = "config.json is"
    raise SourceError(_absent(name, kind, sought))


def _absent(name: str, kind: str, sought: str) -> str:
    """That something is neither here nor to be had now, and what to do."""
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"the hub at {_endpoint()} cannot be reached"
    return (
        f"{kind} {name}: there is no such folder, {sought} not in the local cache and {why}; "
        "download it once online, or give a folder"
    )


def _endpoint() -> str:
    """The hub's address, without a password that stands in it."""
    return redact(constants.ENDPOINT)


def _find_snapshot(repository: str, arguments: dict[str, Any]) -> Path | None:
    """The snapshot in the cache, with whatever files it has, or None."""
    try:
        path = Path(snapshot_download(repository, local_files_only=True, **arguments))
    except LocalEntryNotFoundError as error:
        # huggingface_hub names the folder of a snapshot that it knows to be incomplete.
        found = getattr(error, "snapshot_path", None)
        return Path(found) if found else None
    return path if any(path.rglob("*")) else None


def _cached(repository: str, arguments: dict[str, Any]) -> Path | None:
    """The complete snapshot in the cache, or None."""
    try:
        path = Path(snapshot_download(repository, local_files_only=True, **arguments))
    except LocalEntryNotFoundError:
        return None
    return path if _is_complete(path, arguments["repo_type"]) else None


def _is_complete(path: Path, kind: str) -> bool:
    """Whether a snapshot holds what it is wanted for; a plan fetches config.json alone."""
    if kind == "dataset":
        rows = (p for pattern in ROW_PATTERNS for p in path.rglob(pattern))
        return any(not p.name.startswith("dataset_info") for p in rows)
    described = any((path / n).exists() for n in ("config.json", "adapter_config.json"))
    weights = sorted(p.name for p in path.glob("*.safetensors"))
    return described and bool(weights) and all((path / n).exists() for n in _shards(path, weights))


def _shards(path: Path, weights: Sequence[str]) -> Iterator[str]:
    """Every shard that an index lists, or that the name of another one counts."""
    for name in weights:
        if found := _SHARD.fullmatch(name):
            yield from (f"{found[1]}-{i:05d}-of-{found[2]}.safetensors" for i in range(1, int(found[2]) + 1))
    for index in path.glob("*.safetensors.index.json"):
        try:
            listed = json.loads(index.read_bytes())["weight_map"].values()
            yield from {str(n) for n in listed}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # reading the weights will say what is wrong with it


def _download(repository: str, revision: str, arguments: dict[str, Any]) -> Path:
    """Ask with a time limit, which `snapshot_download` knows only for files, then download."""
    api, kind = HfApi(), arguments["repo_type"]
    api.repo_info(repository, repo_type=kind, revision=revision or None, timeout=ANSWER_SECONDS)
    path = Path(snapshot_download(repository, etag_timeout=ANSWER_SECONDS, **arguments))
    if not _is_complete(path, kind):
        # It also returns what is in the cache where it gets no list of the files: ask for one, and again.
        api.list_repo_files(repository, repo_type=kind, revision=revision or None)
        path = Path(snapshot_download(repository, etag_timeout=ANSWER_SECONDS, **arguments))
    return path


def _repeated(call: Callable[[], T]) -> T:
    """Call, and again after each of WAITS while the hub is busy or the connection breaks."""
    for seconds in WAITS:
        try:
            return call()
        except (HfHubHTTPError, _http.TransportError, LocalEntryNotFoundError, OSError) as error:
            if not _passes(error):
                raise
            time.sleep(max(seconds, _asked_to_wait(error)))
    return call()


def _passes(error: BaseException) -> bool:
    """Whether a second attempt may go better: the hub is busy, or a transfer broke off."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in _BUSY
    if isinstance(error, LocalEntryNotFoundError):  # huggingface_hub's word for a failure on the way to a file
        return error.__cause__ is not None and _passes(error.__cause__)
    if isinstance(error, _http.TransportError):
        return not isinstance(error, _UNREACHABLE)
    return "Consistency check failed" in str(error)  # fewer bytes came than were announced


def _asked_to_wait(error: BaseException) -> float:
    """Seconds of the hub's Retry-After, at most a minute."""
    response = getattr(error if isinstance(error, HfHubHTTPError) else error.__cause__, "response", None)
    value = response.headers.get("retry-after", "") if response is not None else ""
    return min(60.0, float(value)) if value.isdigit() else 0.0


def _fitting(error: Exception, kind: str, name: str) -> Exception:
    """The error of ours for one of the hub's client."""
    if isinstance(error, HFValidationError):
        return SourceError(f"{kind} {name!r}: neither a folder nor a hub id (org/name[@revision]): {error}")
    if isinstance(error, HfHubHTTPError | _http.TransportError | LocalEntryNotFoundError):
        return _explain(error, kind, name)
    return SourceError(
        f"{kind} {name}: cannot be stored in {constants.HF_HUB_CACHE}: {getattr(error, 'strerror', None) or error}; "
        "HF_HOME chooses another folder"
    )


def _explain(error: Exception, kind: str, name: str) -> Exception:
    """What the person can do; the library's own text may hold a signed address, so none of it is passed on."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    repository, _, revision = name.partition("@")
    if isinstance(error, RevisionNotFoundError):
        return SourceError(f"{kind} {repository}: no revision {revision!r} on the hub; see {_page(repository, kind)}")
    if not isinstance(error, HfHubHTTPError):
        return HubError(
            f"{kind} {name}: the connection to {_endpoint()} broke off ({type(error).__name__}), "
            f"{len(WAITS) + 1} times in a row; run the same command again: complete files are kept"
        )
    if reason := _refusal(error, _page(repository, kind)):
        return SourceError(f"{kind} {name}: {reason}")
    if isinstance(error, RepositoryNotFoundError) or error.response.status_code == 404:
        return SourceError(
            f"{kind} {name}: no such local folder, and no such repository at {_page(repository, kind)} "
            "(a private one needs an HF_TOKEN that may read it)"
        )
    return HubError(
        f"{kind} {name}: {_endpoint()} answered {error.response.status_code}, {len(WAITS) + 1} times in a row; "
        "run the same command again later: complete files are kept"
    )


def _refusal(error: HfHubHTTPError, page: str) -> str | None:
    """Why the hub does not let this person in, and the page to open; None where it is something else."""
    status, tokens = error.response.status_code, f"{_endpoint()}/settings/tokens"
    if status == 401 and get_token():
        return f"the hub does not know the token of HF_TOKEN or `hf auth login` (401); make a new one at {tokens}"
    if status == 401 and isinstance(error, GatedRepoError):
        return f"gated, and no token says who asks (401); accept its terms at {page}, then set HF_TOKEN from {tokens}"
    if status == 401:
        return f"no such local folder, and nothing public at {page} (401); for a private one set HF_TOKEN from {tokens}"
    if isinstance(error, GatedRepoError):
        return (
            f"gated, and this account may not read it yet ({status}); open {page} and accept its terms; a fine-grained "
            f"token also needs the permission to read gated repositories, see {tokens}"
        )
    if status == 403:
        return f"the token lacks a permission that this needs (403); see {page}, and the token's scope at {tokens}"
    return None


def _page(repository: str, kind: str = "model") -> str:
    return f"{_endpoint()}/{'datasets/' if kind == 'dataset' else ''}{repository}"


def check_repository(repository: str) -> None:
    """Raise ConfigError unless a result's repository has the form `org/name`; asks nobody."""
    if not _REPOSITORY.fullmatch(repository):
        raise ConfigError(f"--push-to-hub {repository!r}: give a repository as org/name, without a revision")


def check_push(repository: str) -> None:
    """Make sure, before any work, that a result can be pushed to a model repository.

    Parameters
    ----------
    repository : str
        `org/name`; it need not exist yet.

    Raises
    ------
    ConfigError
        Not of that form, offline, no token, or a token that cannot write there.
    SourceError
        The hub cannot be reached.
    """
    what, tokens = f"--push-to-hub {repository}", f"{_endpoint()}/settings/tokens"
    later = "leave the flag out, and push the finished result later by the same command with --resume and it"
    check_repository(repository)
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"{what}: HF_HUB_OFFLINE is set; {later}")
    if not get_token():
        raise ConfigError(f"{what}: there is no token; set HF_TOKEN to one that may write, from {tokens}")
    try:
        _repeated(lambda: _exists(repository))
        account = _repeated(HfApi().whoami)
    except _http.TransportError:
        raise SourceError(f"{what}: the hub at {_endpoint()} cannot be reached; {later}") from None
    except HfHubHTTPError as error:
        reason = _refusal(error, _page(repository)) or f"the hub answered {error.response.status_code}; {later}"
        raise ConfigError(f"{what}: {reason}") from None
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise ConfigError(f"{what}: the token may only read; make one that may write at {tokens}")
    names = [account["name"], *(o["name"] for o in account.get("orgs", []))]
    if repository.split("/")[0] not in names:
        raise ConfigError(f"{what}: this token's account writes to {', '.join(names)}; take one of them before the /")


def _exists(repository: str) -> bool:
    try:
        HfApi().repo_info(repository, timeout=ANSWER_SECONDS)
    except RepositoryNotFoundError as error:
        if error.response.status_code == 404:
            return False
        raise
    return True


def push(repository: str, files: Sequence[tuple[str, Path | bytes]], message: str) -> str:
    """Upload files to a model repository in one commit; a new repository is private.

    Files that are there already stay unless one of the same name comes.

    Parameters
    ----------
    repository : str
        `org/name`.
    files : sequence of (name, path or content)
        What to upload.
    message : str
        Of the commit.

    Returns
    -------
    str
        The commit's page.

    Raises
    ------
    HubError
        The upload failed; the repository is as it was before.
    """
    api = HfApi()

    def upload() -> str:
        api.create_repo(repository, private=True, exist_ok=True)
        added = [CommitOperationAdd(name, str(f) if isinstance(f, Path) else f) for name, f in files]
        return redact(str(api.create_commit(repository, added, commit_message=message).commit_url))

    try:
        return _repeated(upload)
    except HfHubHTTPError as error:
        reason = _refusal(error, _page(repository)) or f"the hub answered {error.response.status_code}"
    except (_http.TransportError, OSError, RuntimeError, ValueError) as error:
        reason = f"the upload broke off ({type(error).__name__})"
    raise HubError(f"{repository}: not pushed: {reason}")


def describe_hub() -> dict[str, Any]:
    """Where models come from: endpoint, offline switch, cache with its size, and whether there is a token.

    Returns
    -------
    dict
        `token` is "HF_TOKEN", "stored" or None, never the token itself.
    """
    cache = Path(constants.HF_HUB_CACHE)
    token = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "stored" if get_token() else None
    return {
        "endpoint": _endpoint(),
        "offline": constants.HF_HUB_OFFLINE,
        "token": token,
        "home": constants.HF_HOME,
        "cache": str(cache),
        "cache_bytes": sum(p.stat().st_size for p in cache.glob("*--*/blobs/*") if p.is_file()),
    }
