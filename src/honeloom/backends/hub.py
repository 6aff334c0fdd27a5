"""Models and datasets from the Hugging Face hub: safetensors and rows only, at a resolved commit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from honeloom.errors import NotCachedError, SourceError

__all__ = ["fetch_dataset", "fetch_model"]

MODEL_PATTERNS = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.model",
    "merges.txt",
    "vocab.txt",
    "*.jinja",
]
ROW_PATTERNS = [
    f"*{ending}{packed}" for ending in (".jsonl", ".json", ".csv", ".tsv") for packed in ("", ".gz", ".zst")
]
ROW_PATTERNS += ["*.parquet", "*.arrow"]


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
    """
    path = _snapshot(name, "model", MODEL_PATTERNS, fetch, "config.json")
    if not any(path.glob("*.safetensors")):
        raise SourceError(f"{name}: the repository has no safetensors file; pickled weights are not read")
    return path, path.name


def fetch_dataset(name: str, *, fetch: bool = True) -> tuple[Path, str]:
    """Return the local snapshot and commit of a dataset repository; raises as `fetch_model`."""
    path = _snapshot(name, "dataset", ROW_PATTERNS, fetch, "its row files")
    return path, path.name


def _snapshot(name: str, kind: str, patterns: list[str], fetch: bool, sought: str) -> Path:
    repository, _, revision = name.partition("@")
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}
    arguments: dict[str, Any] = {"repo_type": kind, "revision": revision or None, "allow_patterns": patterns}
    try:
        if not fetch or offline:
            path = Path(snapshot_download(repository, local_files_only=True, **arguments))
            if not any(path.rglob("*")):
                raise LocalEntryNotFoundError("empty snapshot")
            return path
        return Path(snapshot_download(repository, etag_timeout=5, **arguments))
    except HFValidationError as error:
        raise SourceError(f"{kind} {name!r}: neither a folder nor a hub id (org/name[@revision]): {error}") from None
    except GatedRepoError:
        raise SourceError(
            f"{kind} {name} is gated: accept its terms at https://huggingface.co/{repository} and set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise SourceError(f"{kind} {repository}: no revision {revision!r} on the hub") from None
    except RepositoryNotFoundError:
        raise SourceError(
            f"{kind} {name}: no such local folder, and no such repository on the hub (a private one needs HF_TOKEN)"
        ) from None
    except LocalEntryNotFoundError:
        if not fetch:
            raise NotCachedError(f"{kind} {name} is not in the cache") from None
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        raise SourceError(
            f"{kind} {name}: {sought} is not in the local cache and {why}; download it once online, or give a folder"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise SourceError(
            f"{kind} {name}: the hub answered {error}; the download resumes when you run it again"
        ) from None
