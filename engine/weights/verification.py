"""Makes and checks manifests: every byte of a checkpoint's files, hashed on several threads. Torch-free."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from engine.errors import CheckpointError
from engine.gguf.header import is_gguf
from engine.gguf.header import read_header as read_gguf_header
from engine.weights.checkpoint import INDEX_FILE
from engine.weights.hashing import sha256_of
from engine.weights.manifest import DEFAULT_CHUNK_BYTES, FileRecord, Manifest, covered_files
from engine.weights.safetensors_file import read_header

ProgressCallback = Callable[[int, int], None]
"""Called with (bytes hashed, bytes to hash)."""

_MAX_THREADS = 16
_HEADER = "(header)"


@dataclass(frozen=True)
class Damage:
    """How one file differs from what it should be.

    ``kind``: missing, extra, size or content. ``begin``, ``end``: the range of bytes in which the content differs.
    ``tensors``: those with bytes in it; "(header)" for what stands before them.
    """

    file: str
    kind: str
    detail: str
    begin: int = 0
    end: int = 0
    tensors: tuple[str, ...] = ()


def make_manifest(
    checkpoint: Path, on_progress: ProgressCallback, chunk_bytes: int = DEFAULT_CHUNK_BYTES
) -> tuple[Manifest, list[Damage]]:
    """Hash all files. The damage is what differs from the hub's own hashes, by which its cache names the files.

    Raises CheckpointError where there are no weights or a file cannot be read.
    """
    files = covered_files(checkpoint)
    if not any(path.suffix in (".safetensors", ".gguf") for path in files):
        raise CheckpointError(f"{checkpoint} holds no safetensors or GGUF files, so it is no checkpoint to verify")
    sizes = [path.stat().st_size for path in files]
    # Of the whole file first: no other thread can help with it.
    ranges = [(path, 0, size) for path, size in zip(files, sizes, strict=True)]
    for path, size in zip(files, sizes, strict=True):
        ranges += [(path, begin, end) for begin, end in _chunks(size, chunk_bytes)]
    digests = _hash_all(ranges, on_progress)
    wholes, rest = digests[: len(files)], iter(digests[len(files) :])
    records, damage = {}, []
    for path, size, whole in zip(files, sizes, wholes, strict=True):
        records[path.name] = FileRecord(size, whole, tuple(next(rest) for _ in _chunks(size, chunk_bytes)))
        if not _is_what_the_hub_had(path, whole):
            detail = "is not the file that the hub's cache names; download it again"
            damage.append(Damage(path.name, "content", detail, 0, size, _tensors_in(path, 0, size)))
    return Manifest(chunk_bytes, records), damage


def find_damage(checkpoint: Path, manifest: Manifest, on_progress: ProgressCallback) -> list[Damage]:
    """Compare all files with the manifest. Raises CheckpointError where a file cannot be read."""
    files = {path.name: path for path in covered_files(checkpoint)}
    damage = [Damage(name, "missing", "is missing") for name in sorted(manifest.files.keys() - files.keys())]
    damage += [Damage(name, "extra", "is not in the manifest") for name in sorted(files.keys() - manifest.files.keys())]
    ranges: list[_Range] = []
    expected: list[str] = []
    for name in sorted(files.keys() & manifest.files.keys()):
        size, record = files[name].stat().st_size, manifest.files[name]
        if size != record.size:
            damage.append(Damage(name, "size", f"has {size} bytes; the manifest says {record.size}"))
            continue
        ranges += [(files[name], begin, end) for begin, end in _chunks(size, manifest.chunk_bytes)]
        expected += record.chunks
    digests = _hash_all(ranges, on_progress)
    wrong = [piece for piece, digest, right in zip(ranges, digests, expected, strict=True) if digest != right]
    return damage + [_content_damage(*piece) for piece in _joined(wrong)]


def describe(damage: Damage) -> str:
    """One line."""
    tensors = ", ".join(damage.tensors[:5]) + (f" and {len(damage.tensors) - 5} more" if damage.tensors[5:] else "")
    return f"{damage.file} {damage.detail}" + (f": {tensors}" if tensors else "")


def _content_damage(path: Path, begin: int, end: int) -> Damage:
    detail = f"differs in bytes {begin} to {end}"
    return Damage(path.name, "content", detail, begin, end, _tensors_in(path, begin, end))


def _chunks(size: int, chunk_bytes: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + chunk_bytes, size)) for begin in range(0, size, chunk_bytes)]


_Range = tuple[Path, int, int]


def _hash_all(ranges: Sequence[_Range], on_progress: ProgressCallback) -> list[str]:
    """Hashes in the order of ``ranges``."""
    total = sum(end - begin for _, begin, end in ranges)
    done = 0
    on_progress(done, total)
    num_threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(num_threads, thread_name_prefix="hash") as pool:
        futures: list[Future[str]] = [pool.submit(sha256_of, *piece) for piece in ranges]
        sizes = {future: end - begin for future, (_, begin, end) in zip(futures, ranges, strict=True)}
        pending = set(futures)
        try:
            while pending:
                finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                done += sum(sizes[future] for future in finished)
                on_progress(done, total)
            return [future.result() for future in futures]
        except OSError as error:
            raise CheckpointError(
                f"{error.filename or ranges[0][0].parent} cannot be read: {error.strerror}"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _joined(pieces: Sequence[_Range]) -> Iterator[_Range]:
    """Neighbouring ranges of a file as one."""
    last: _Range | None = None
    for path, begin, end in pieces:
        if last is not None and last[0] == path and last[2] == begin:
            last = (path, last[1], end)
            continue
        if last is not None:
            yield last
        last = (path, begin, end)
    if last is not None:
        yield last


def _tensors_in(path: Path, begin: int, end: int) -> tuple[str, ...]:
    """Tensors of a file with bytes in [begin, end); all that the index knows where the header is broken."""
    if is_gguf(path):
        return _gguf_tensors_in(path, begin, end)
    if path.suffix != ".safetensors":
        return ()
    try:
        header = read_header(path)
    except CheckpointError:
        return (_HEADER, *_tensors_of_index(path))
    names = header.overlapping(begin, end)
    return (*((_HEADER,) if begin < header.data_start else ()), *names)


def _gguf_tensors_in(path: Path, begin: int, end: int) -> tuple[str, ...]:
    try:
        header = read_gguf_header(path)
    except CheckpointError:
        return (_HEADER,)
    tensors = sorted(header.tensors.values(), key=lambda tensor: tensor.offset)
    limits = [*(tensor.offset for tensor in tensors[1:]), header.num_bytes]
    before = (_HEADER,) if not tensors or begin < tensors[0].offset else ()
    inside = [t.name for t, limit in zip(tensors, limits, strict=False) if max(t.offset, begin) < min(limit, end)]
    return (*before, *inside)


def _tensors_of_index(path: Path) -> list[str]:
    try:
        weight_map = json.loads((path.parent / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
        return sorted(name for name, file in weight_map.items() if file == path.name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def _is_what_the_hub_had(path: Path, sha256: str) -> bool:
    """In the hub's cache a file is a link to a blob that is named by its SHA-256, or by Git's hash of it."""
    name = path.resolve().name if path.is_symlink() else ""
    if re.fullmatch("[0-9a-f]{64}", name):
        return name == sha256
    if re.fullmatch("[0-9a-f]{40}", name):
        content = path.read_bytes()
        return name == hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return True
