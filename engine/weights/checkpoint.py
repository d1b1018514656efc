"""The tensors of a safetensors checkpoint: where each one lies, read from the files' headers alone.

A checkpoint is one file or several shards with an index. Torch-free.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from engine.errors import CheckpointError
from engine.weights.other_forms import describe_other_form
from engine.weights.safetensors_file import FLOAT_FORMATS, SafetensorsHeader, TensorEntry, read_header

__all__ = ["FLOAT_FORMATS", "Checkpoint", "TensorEntry"]

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_DOUBLED = re.compile(r"\.self_attn\.[kv]_proj\.(weight|weight_scale|bias)$")
"""What has a row, or a number, for each element of each key-value head."""


class Checkpoint:
    """The tensors of a directory, by name. Opening it reads headers, no weights.

    ``kv_head_dim``: size of a key-value head, where heads that are stored twice shall be recognised. ``aliases``: the
    tensor to take where another is missing. ``file_bytes``: of each of its files, as they were then.
    ``has_doubled_heads``: whether an ``entry`` so far was one of doubled heads.

    Raises CheckpointError, naming the file, where one is missing, truncated or not safetensors, and where two hold the
    same tensor.
    """

    def __init__(
        self, directory: str | Path, kv_head_dim: int | None = None, aliases: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.directory = Path(directory)
        self.file_bytes: dict[Path, int] = {}
        self.has_doubled_heads = False
        self._kv_head_dim = kv_head_dim
        self._aliases = aliases
        self._index = _read_index(self.directory)
        self._entries: dict[str, TensorEntry] = {}
        for name in sorted(set(self._index.values())) or [SINGLE_FILE]:
            self._add_file(name)

    def _add_file(self, file_name: str) -> None:
        path = self.directory / file_name
        header = _header_of(path, self._tensors_of(file_name))
        self.file_bytes[path] = header.file_bytes
        for entry in header.entries:
            # Where the index names one of several files that hold a tensor, that one counts.
            if self._index.get(entry.name, file_name) != file_name:
                continue
            if entry.name in self._entries:
                other = self._entries[entry.name].file
                raise CheckpointError(f"{path}: tensor {entry.name!r} stands in {other} too, and the index in neither")
            self._entries[entry.name] = entry

    def entry(
        self,
        name: str,
        shape: tuple[int, ...],
        formats: Sequence[str] = FLOAT_FORMATS,
        stored_shapes: Sequence[tuple[int, ...]] = (),
    ) -> TensorEntry:
        """The tensor ``name``, whose shape must be ``shape`` (or one of ``stored_shapes``, with as many elements: then
        it is given as one of ``shape``; (-1,) for one dimension of at most that size) and whose format one of
        ``formats``.

        Meta's first form of Llama 3.1 405B has every key-value head twice. Such a tensor of ``shape`` [heads × dim, …]
        is given as one of [heads, 2, dim, …], of which the first of each pair is to be read.

        Raises CheckpointError, naming file and tensor, where it is missing or different.
        """
        entry = self._entries.get(name) or self._entries.get(self._aliases.get(name, ""))
        if entry is None:
            where = self.directory / self._index[name] if name in self._index else self.directory
            raise CheckpointError(f"{where} has no tensor {name!r}, which the model of its config.json needs")
        if entry.shape in stored_shapes:
            entry = dataclasses.replace(entry, shape=shape)
        elif self._kv_head_dim and _DOUBLED.search(name) and entry.shape == (2 * shape[0], *shape[1:]):
            shape = (shape[0] // self._kv_head_dim, 2, self._kv_head_dim, *shape[1:])
            entry = dataclasses.replace(entry, shape=shape)
            self.has_doubled_heads = True
        is_shorter = (-1,) in stored_shapes and len(entry.shape) == 1 and entry.shape < shape
        if entry.shape != shape and not is_shorter:
            raise CheckpointError(
                f"{entry.file}: tensor {name!r} has shape {list(entry.shape)}; config.json makes it {list(shape)}"
            )
        if entry.format not in formats:
            raise CheckpointError(
                f"{entry.file}: tensor {name!r} is in format {entry.format}; expected is {' or '.join(formats)}"
            )
        return entry

    def _tensors_of(self, file_name: str) -> str:
        """For messages: an example of what a file should hold."""
        names = sorted(name for name, file in self._index.items() if file == file_name)
        return f" (it should hold {len(names)} tensors, {names[0]!r} the first)" if names else ""


def _header_of(path: Path, content: str) -> SafetensorsHeader:
    """``content`` is added to the message where the file is missing."""
    try:
        return read_header(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing{content}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def _read_index(directory: Path) -> dict[str, str]:
    """Tensor name to file name; empty where the checkpoint is a single file."""
    path = directory / INDEX_FILE
    if not path.exists():
        if not (directory / SINGLE_FILE).exists():
            raise CheckpointError(
                describe_other_form(directory)
                or f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}; only safetensors checkpoints are read"
            )
        return {}
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        index = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not an index of safetensors files: {str(error)[:200]!r}") from error
    if not index:
        raise CheckpointError(f"{path} names no tensors")
    for name, file in index.items():
        if Path(file).name != file or not file.isprintable():
            raise CheckpointError(f"{path} places tensor {name!r} outside its directory, in {file!r}")
    return index
