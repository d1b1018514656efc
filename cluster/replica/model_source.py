"""From what the user typed (a directory, a GGUF file, a hub id, the embedded model) to where it is on this host."""

import importlib.resources
import os
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import httpx2
from filelock import FileLock
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from cluster.config import EMBEDDED_MODEL
from engine.errors import CheckpointError
from engine.gguf.header import is_gguf
from engine.weights.other_forms import describe_other_form

_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "LICENSE*", "NOTICE*", "USE_POLICY*", "README.md"]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class ModelSource:
    """What is served, the same on every host. ``revision`` is a full commit hash for a hub id, None otherwise."""

    model: str
    revision: str | None = None

    def directory(self) -> Path:
        """The checkpoint's directory (or GGUF file) on this host, downloaded first where it is a hub id (resumable; one
        process per host downloads, others wait). Raises CheckpointError."""
        if self.model == EMBEDDED_MODEL:
            return Path(str(importlib.resources.files("engine"))) / "assets" / EMBEDDED_MODEL
        if self.revision is None:
            return _local_directory(self.model)
        return _download(self.model, self.revision)

    def cached(self) -> Path | None:
        """As ``directory``, from what this host has already, without the network. None: a hub's model that would have
        to be downloaded first. Raises CheckpointError."""
        if self.revision is None:
            return self.directory()
        try:
            found = snapshot_download(self.model, revision=self.revision, allow_patterns=_FILES, local_files_only=True)
        except LocalEntryNotFoundError:
            return None
        return Path(found)

    def cached_bytes(self) -> int:
        """Of the files of a hub's model that would be downloaded, those that this host has already. 0 for what is no
        hub's. Raises OSError."""
        if self.revision is None:
            return 0
        cache = Path(constants.HF_HUB_CACHE).expanduser()
        snapshot = cache / repo_folder_name(repo_id=self.model, repo_type="model") / "snapshots" / self.revision
        files = ((path, str(path.relative_to(snapshot))) for path in snapshot.rglob("*") if path.is_file())
        return sum(path.stat().st_size for path, name in files if any(fnmatch(name, pattern) for pattern in _FILES))


def resolve(model: str, revision: str | None) -> ModelSource:
    """Decide what ``model`` names and pin a hub id to a commit. Raises CheckpointError with the remedy."""
    if model == EMBEDDED_MODEL and not Path(model).is_dir():
        return ModelSource(model)
    if Path(model).exists() or not _HUB_ID.fullmatch(model):
        _local_directory(model)
        return ModelSource(str(Path(model).resolve()))
    # What was downloaded under the branch's name tells the commit, offline too.
    snapshot = _download(model, revision or constants.DEFAULT_REVISION)
    return ModelSource(model, snapshot.name)


def _local_directory(model: str) -> Path:
    path = Path(model)
    if path.is_file() and is_gguf(path):
        return path.resolve()
    if not path.is_dir():
        raise CheckpointError(
            f"{model} is not a directory on {os.uname().nodename}; give a directory in Hugging Face form, "
            f"a GGUF file, a hub id as in organisation/name, or {EMBEDDED_MODEL}"
        )
    if not (path / "config.json").is_file():
        raise CheckpointError(
            describe_other_form(path) or f"{model} has no config.json, so it is not a checkpoint in Hugging Face form"
        )
    return path.resolve()


def _download(repo_id: str, revision: str) -> Path:
    lock_dir = Path(constants.HF_HUB_CACHE)
    lock_dir.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock_dir / f".remuda-{repo_id.replace('/', '--')}.lock"):
            return Path(snapshot_download(repo_id, revision=revision, allow_patterns=_FILES))
    except _HUB_ERRORS as error:
        raise _as_checkpoint_error(repo_id, revision, error) from error


_HUB_ERRORS = (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    httpx2.HTTPError,
    OSError,
)


def _as_checkpoint_error(repo_id: str, revision: str, error: Exception) -> CheckpointError:
    if isinstance(error, GatedRepoError):
        return CheckpointError(f"{repo_id} is gated: accept its terms on the hub and set HF_TOKEN")
    if isinstance(error, RevisionNotFoundError):
        return CheckpointError(f"{repo_id} has no revision {revision}; leave --revision out for the newest")
    if isinstance(error, RepositoryNotFoundError):
        return CheckpointError(f"the hub has no model {repo_id}, or it is private and HF_TOKEN is missing or wrong")
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        return CheckpointError(f"{repo_id} at {revision} is not in this host's cache and {why}; give a local directory")
    return CheckpointError(f"{repo_id} cannot be had from the hub: {error}")
