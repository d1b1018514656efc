"""Checks a checkpoint's hashes while its weights load, on a thread beside the loader and from the same page cache.

The ranks of a host share the work: every chunk is hashed by one of them. Torch-free.
"""

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from engine.errors import CheckpointError
from engine.weights.hashing import sha256_of
from engine.weights.manifest import Manifest, manifest_path, read_manifest
from engine.weights.safetensors_file import TensorEntry

_WEIGHT_SUFFIXES = (".safetensors", ".gguf")


@dataclass(frozen=True)
class HostShare:
    """This rank is number ``index`` of the ``count`` ranks on its host."""

    index: int = 0
    count: int = 1


def open_manifest(checkpoint: Path) -> Manifest | None:
    """The manifest of a checkpoint's directory or file, if it has one, after a look at the sizes of all its files.

    Raises CheckpointError where it is broken, or a file is missing or of another size.
    """
    path = manifest_path(checkpoint)
    try:
        manifest = read_manifest(path)
    except FileNotFoundError:
        return None
    for name, record in manifest.files.items():
        file = path.parent / name
        try:
            size = file.stat().st_size
        except OSError as error:
            raise CheckpointError(f"{file} is in the manifest and cannot be read: {error.strerror}") from error
        if size != record.size:
            raise CheckpointError(f"{file} has {size} bytes; the manifest says {record.size}{_remedy(path)}")
    return manifest


class LoadCheck:
    """Between ``with`` and its end a thread hashes this rank's share of the chunks with bytes of ``needed`` tensors, of
    the first chunks of their files, and of the manifest's other files (configuration, tokenizer).

    Without a manifest nothing is done. ``needed`` must be the same on all ranks of the host: those of the whole model.

    Raises CheckpointError at once where a weight file is not in the manifest.
    """

    def __init__(
        self, checkpoint: Path, manifest: Manifest | None, needed: Iterable[TensorEntry], share: HostShare
    ) -> None:
        self._path = manifest_path(checkpoint)
        self._manifest = manifest
        self._entries = sorted(needed, key=lambda entry: (entry.file, entry.offset)) if manifest else []
        self._failure: Exception | None = None
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hash-check", daemon=True)
        chunks = [] if manifest is None else list(self._all_chunks(manifest))
        self._chunks = chunks[share.index :: share.count]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_stopped.set()
        self._thread.join()

    def raise_failure(self) -> None:
        """Raises CheckpointError, naming file, bytes and tensors, if a chunk was found damaged by now."""
        if self._failure is not None:
            raise self._failure

    def finish(self) -> None:
        """Wait until all chunks are hashed. Raises as ``raise_failure``."""
        self._thread.join()
        self.raise_failure()

    def _all_chunks(self, manifest: Manifest) -> Iterator[tuple[Path, int]]:
        """(file, index of the chunk), in the order in which the loader reads."""
        for name in sorted(manifest.files):
            if not name.endswith(_WEIGHT_SUFFIXES):
                yield from ((self._path.parent / name, index) for index in range(len(manifest.files[name].chunks)))
        needed: dict[tuple[Path, int], None] = {}
        for entry in self._entries:
            if entry.file.name not in manifest.files:
                raise CheckpointError(f"{entry.file} is not in the manifest{_remedy(self._path)}")
            # Its header.
            needed[entry.file, 0] = None
            end = entry.offset + entry.num_bytes
            for index in range(entry.offset // manifest.chunk_bytes, -(-end // manifest.chunk_bytes)):
                needed[entry.file, index] = None
        yield from needed

    def _run(self) -> None:
        try:
            for file, index in self._chunks:
                if self._is_stopped.is_set():
                    return
                self._check(file, index)
        except Exception as error:  # noqa: BLE001  # handed to the thread that loads
            self._failure = error

    def _check(self, file: Path, index: int) -> None:
        assert self._manifest is not None
        record = self._manifest.files[file.name]
        begin = index * self._manifest.chunk_bytes
        end = min(begin + self._manifest.chunk_bytes, record.size)
        try:
            digest = sha256_of(file, begin, end)
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
        if digest != record.chunks[index]:
            raise CheckpointError(
                f"{file} is damaged in bytes {begin} to {end}, by the manifest{self._tensors_in(file, begin, end)}"
                f"{_remedy(self._path)}"
            )

    def _tensors_in(self, file: Path, begin: int, end: int) -> str:
        names = [
            repr(entry.name)
            for entry in self._entries
            if entry.file == file and entry.offset < end and entry.offset + entry.num_bytes > begin
        ]
        if not names:
            return ""
        return f": tensor {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if names[3:] else "")


def _remedy(path: Path) -> str:
    return f"; download it again or, if the change is meant, delete {path} and run remuda verify anew"
