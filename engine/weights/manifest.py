"""The manifest of a checkpoint: sizes and hashes of its files, so that damage is found and located. Torch-free.

A directory has its manifest inside, a single file beside it. Hashes are SHA-256, of whole files (to compare with what
others publish) and of chunks (to check in parallel and in part).
"""

import os
import re
import tempfile
from pathlib import Path
from typing import Literal

import msgspec

from engine.errors import CheckpointError

MANIFEST_FILE = "remuda-manifest.json"
GOLDEN_FILE = "remuda-golden.json"
"""See engine.weights.golden. Ours, as the manifest is, and so in no manifest."""
DEFAULT_CHUNK_BYTES = 16 * 2**20
_COVERED_SUFFIXES = (".safetensors", ".gguf", ".json", ".jinja", ".model")
"""Weights, their index, configurations, tokenizer and template: what is read to serve a model."""
_DIGEST = re.compile("[0-9a-f]{64}")


class FileRecord(msgspec.Struct, frozen=True):
    """``chunks``: the hash of each ``chunk_bytes`` of the file, the last one shorter."""

    size: int
    sha256: str
    chunks: tuple[str, ...]


class Manifest(msgspec.Struct, frozen=True):
    """``files``: by name, without directories."""

    chunk_bytes: int
    files: dict[str, FileRecord]
    version: Literal[1] = 1


def manifest_path(checkpoint: Path) -> Path:
    """Where the manifest of a directory or of a single file lies unless told otherwise."""
    if checkpoint.is_dir():
        return checkpoint / MANIFEST_FILE
    return checkpoint.with_name(f"{checkpoint.name}.{MANIFEST_FILE}")


def covered_files(checkpoint: Path) -> list[Path]:
    """What a manifest of ``checkpoint`` holds, in order of name. Raises CheckpointError where there is nothing."""
    if not checkpoint.is_dir():
        if not checkpoint.is_file():
            raise CheckpointError(f"{checkpoint} is neither a directory nor a file; name a checkpoint on this disk")
        return [checkpoint]
    return sorted(
        path
        for path in checkpoint.iterdir()
        if path.suffix in _COVERED_SUFFIXES and not path.name.endswith((MANIFEST_FILE, GOLDEN_FILE)) and path.is_file()
    )


def read_manifest(path: Path) -> Manifest:
    """Raises FileNotFoundError, and CheckpointError where ``path`` is not a manifest."""
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a manifest: {error}; delete it and run remuda verify anew") from error
    if not _is_sound(manifest):
        raise CheckpointError(f"{path} contradicts itself; delete it and run remuda verify anew")
    return manifest


def write_manifest(path: Path, manifest: Manifest) -> None:
    """All or nothing. Raises CheckpointError, naming the remedy, where ``path`` cannot be written."""
    try:
        write_whole(path, msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written ({error.strerror}); name a place for the manifest with --manifest FILE"
        ) from error


def write_whole(path: Path, content: bytes) -> None:
    """All or nothing. Raises OSError."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".remuda-", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _is_sound(manifest: Manifest) -> bool:
    if manifest.chunk_bytes <= 0:
        return False
    for name, record in manifest.files.items():
        if Path(name).name != name or record.size < 0 or not name.isprintable():
            return False
        if len(record.chunks) != -(-record.size // manifest.chunk_bytes):
            return False
        if not all(_DIGEST.fullmatch(digest) for digest in (record.sha256, *record.chunks)):
            return False
    return True
