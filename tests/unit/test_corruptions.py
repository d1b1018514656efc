"""Whatever is wrong with a shard, loading ends with a CheckpointError that names the file and, where it can be known,
the tensor; and no header makes it read beyond the file."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from engine.config import Dtype
from engine.errors import CheckpointError
from engine.model_config import ModelConfig
from engine.models.registry import build_model
from engine.parallel.mesh import Mesh
from engine.weights.loader import load_weights
from engine.weights.manifest import manifest_path, write_manifest
from engine.weights.safetensors_file import read_header
from engine.weights.verification import make_manifest

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 24,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 64,
    "dtype": "bfloat16",
}
VICTIM = "model.layers.0.mlp.up_proj.weight"
SHARD = "model-2.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two shards, the layer in the second."""
    model = build_model(ModelConfig.from_hf(CONFIG), Mesh(), Dtype.BFLOAT16, torch.device("meta"))
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, dict[str, torch.Tensor]] = {"model-1.safetensors": {}, SHARD: {}}
    for piece in model.slices:
        file = SHARD if ".layers." in piece.name else "model-1.safetensors"
        shards[file][piece.name] = torch.randn(piece.shape, generator=generator).bfloat16()
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    for file, tensors in shards.items():
        save_file(tensors, tmp_path / file)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def load(directory: Path) -> None:
    config = ModelConfig.from_directory(directory)
    load_weights(build_model(config, Mesh(), Dtype.BFLOAT16, torch.device("cpu")), directory)


def edit_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    # Of the same length, so that offsets stay true; JSON allows the blanks.
    encoded = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])


def edit_tensor(path: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(path)
    tensors[VICTIM] = change(tensors[VICTIM])
    save_file(tensors, path)


def set_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[3, 5] = value
        return tensor

    return change


def shift_offsets(header: dict[str, Any]) -> None:
    begin, end = header[VICTIM]["data_offsets"]
    header[VICTIM]["data_offsets"] = [begin - 2, end - 2]


def swap_names(header: dict[str, Any]) -> None:
    """One letter of the name is another."""
    header[VICTIM.replace("up", "uq")] = header.pop(VICTIM)


def repeat_entry(path: Path) -> None:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    text = content[8 : 8 + length].rstrip()
    entry = f',"{VICTIM}":{{"dtype":"BF16","shape":[0],"data_offsets":[0,0]}}}}'.encode()
    path.write_bytes(struct.pack("<Q", len(text) - 1 + len(entry)) + text[:-1] + entry + content[8 + length :])


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def replace(path: Path, make: Callable[[Path], None]) -> None:
    path.unlink()
    make(path)


def move_index(directory: Path, file: str) -> None:
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"][VICTIM] = file
    (directory / INDEX).write_text(json.dumps(index))


Corruption = Callable[[Path], object]
CORRUPTIONS: dict[str, tuple[Corruption, str]] = {
    "empty file": (lambda d: os.truncate(d / SHARD, 0), SHARD),
    "cut in the length": (lambda d: os.truncate(d / SHARD, 7), SHARD),
    "cut in the header": (lambda d: os.truncate(d / SHARD, 100), SHARD),
    "cut in the data": (lambda d: os.truncate(d / SHARD, (d / SHARD).stat().st_size - 100), f"{SHARD}.*tensor 'model"),
    "bytes behind the data": (lambda d: os.truncate(d / SHARD, (d / SHARD).stat().st_size + 1), f"{SHARD}.*the last"),
    "a huge header": (lambda d: overwrite(d / SHARD, 0, b"\xff" * 8), SHARD),
    "a flipped byte of the header's length": (lambda d: overwrite(d / SHARD, 0, b"\x01"), SHARD),
    "a flipped byte of the JSON": (lambda d: overwrite(d / SHARD, 8, b"["), SHARD),
    "bytes that are no text": (lambda d: overwrite(d / SHARD, 12, b"\xff\xfe"), SHARD),
    "deep nesting": (lambda d: overwrite(d / SHARD, 8, b"[" * 500), SHARD),
    "shifted offsets": (lambda d: edit_header(d / SHARD, shift_offsets), f"{SHARD}.*'model"),
    "another name": (lambda d: edit_header(d / SHARD, swap_names), f"{SHARD} has no tensor '{VICTIM}'"),
    "an entry twice": (lambda d: repeat_entry(d / SHARD), f"{SHARD}.*{VICTIM}.*twice"),
    "no shape": (lambda d: edit_header(d / SHARD, lambda h: h[VICTIM].pop("shape")), f"{SHARD}.*'{VICTIM}'"),
    "a negative size": (
        lambda d: edit_header(d / SHARD, lambda h: h[VICTIM].update(shape=[-1, 1])),
        f"{SHARD}.*'{VICTIM}'",
    ),
    "sizes that are no integers": (
        lambda d: edit_header(d / SHARD, lambda h: h[VICTIM].update(shape=[1e9, True])),
        f"{SHARD}.*'{VICTIM}'",
    ),
    "sizes without end": (
        lambda d: edit_header(d / SHARD, lambda h: h[VICTIM].update(shape=[2**47] * 2)),
        f"{SHARD}.*'{VICTIM}'",
    ),
    "another shape": (
        lambda d: edit_header(d / SHARD, lambda h: h[VICTIM].update(shape=[8, 32])),
        f"{SHARD}.*'{VICTIM}' has shape",
    ),
    "another format of the same size": (
        lambda d: edit_header(d / SHARD, lambda h: h[VICTIM].update(dtype="I16")),
        f"{SHARD}.*'{VICTIM}' is in format I16",
    ),
    "another format of another size": (
        lambda d: edit_header(d / SHARD, lambda h: h[VICTIM].update(dtype="F32")),
        f"{SHARD}.*'{VICTIM}'",
    ),
    "a format that does not exist": (
        lambda d: edit_header(d / SHARD, lambda h: h[VICTIM].update(dtype="Q7")),
        f"{SHARD}.*'{VICTIM}' is in format Q7",
    ),
    "a float8 tensor in a float model": (
        lambda d: edit_tensor(d / SHARD, lambda t: t.to(torch.float8_e4m3fn)),
        f"{SHARD}.*'{VICTIM}' is in format F8_E4M3",
    ),
    "NaN": (lambda d: edit_tensor(d / SHARD, set_value(float("nan"))), f"{SHARD}.*'{VICTIM}' holds NaN or infinite"),
    "infinity": (
        lambda d: edit_tensor(d / SHARD, set_value(float("inf"))),
        f"{SHARD}.*'{VICTIM}' holds NaN or infinite",
    ),
    "a directory in its place": (lambda d: replace(d / SHARD, os.mkdir), f"{SHARD} cannot be read: Is a directory"),
    "a pipe in its place": (lambda d: replace(d / SHARD, os.mkfifo), f"{SHARD} is not a file"),
    "no file": (lambda d: (d / SHARD).unlink(), f"{SHARD} is missing .*'model.layers.0"),
    "the index in another file": (lambda d: move_index(d, "model-3.safetensors"), f"model-3.*{VICTIM}"),
    "the index in the wrong shard": (lambda d: move_index(d, "model-1.safetensors"), f"model-1.*'{VICTIM}'"),
    "the index outside": (lambda d: move_index(d, "/etc/passwd"), f"{INDEX} places tensor '{VICTIM}' outside"),
    "an index with an unprintable name": (lambda d: move_index(d, "a\0\ud800"), f"{INDEX} places tensor '{VICTIM}'"),
    "a broken index": (lambda d: os.truncate(d / INDEX, 50), INDEX),
    "an empty index": (lambda d: (d / INDEX).write_text('{"weight_map": {}}'), f"{INDEX} names no tensors"),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corrupt_shard_names_file_and_tensor(checkpoint: Path, name: str) -> None:
    load(checkpoint)
    corrupt, message = CORRUPTIONS[name]
    corrupt(checkpoint)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(checkpoint)
    # It travels as JSON to who started it, and is one line on a terminal.
    str(caught.value).encode()
    assert "\n" not in str(caught.value)


def test_float8_is_checked_for_nan(tmp_path: Path) -> None:
    config = CONFIG | {"quantization_config": {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = build_model(ModelConfig.from_hf(config), Mesh(), Dtype.BFLOAT16, torch.device("meta"))
    tensors = {piece.name: torch.ones(piece.shape).to(piece.destination.dtype) for piece in model.slices}
    assert tensors[VICTIM].dtype == torch.float8_e4m3fn
    save_file(tensors, tmp_path / "model.safetensors")
    load(tmp_path)
    for code in (0x7F, 0xFF):
        tensors[VICTIM].view(torch.uint8)[3, 5] = code
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"'{VICTIM}' holds NaN or infinite"):
            load(tmp_path)


def test_a_flipped_bit_that_is_still_a_number_is_found_by_the_manifest_alone(checkpoint: Path) -> None:
    manifest, _ = make_manifest(checkpoint, lambda done, total: None, 64)
    header = read_header(checkpoint / SHARD)
    offset = next(entry.offset for entry in header.entries if entry.name == VICTIM)
    content = (checkpoint / SHARD).read_bytes()
    overwrite(checkpoint / SHARD, offset + 200, bytes([content[offset + 200] ^ 1]))
    load(checkpoint)
    write_manifest(manifest_path(checkpoint), manifest)
    with pytest.raises(CheckpointError, match=f"{SHARD} is damaged in bytes .* by the manifest: tensor '{VICTIM}'"):
        load(checkpoint)


def test_a_file_that_grows_while_it_is_read(checkpoint: Path) -> None:
    config = ModelConfig.from_directory(checkpoint)
    model = build_model(config, Mesh(), Dtype.BFLOAT16, torch.device("cpu"))
    size = (checkpoint / SHARD).stat().st_size

    def grow(done: int, total: int) -> None:
        os.truncate(checkpoint / SHARD, size + 8)

    with pytest.raises(CheckpointError, match=f"{SHARD} changed from {size} to {size + 8} bytes while it was read"):
        load_weights(model, checkpoint, on_progress=grow)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
SIZES = st.lists(st.integers(-1, 9) | st.integers(2**31, 2**65) | JSON, max_size=3)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F8_E4M3", "I64", "F4", ""]) | JSON,
        "shape": SIZES | JSON,
        "data_offsets": st.tuples(st.integers(-1, 80), st.integers(-1, 80)).map(list) | SIZES | JSON,
    },
)
HEADERS = st.one_of(
    st.binary(max_size=60),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(st.text(max_size=3), ENTRIES | JSON, max_size=4).map(lambda value: json.dumps(value).encode()),
)


@given(header=HEADERS, length=st.none() | st.integers(0, 2**64 - 1) | st.integers(0, 90), data=st.binary(max_size=70))
@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_random_headers_are_refused_or_lie_within_the_file(
    tmp_path: Path, header: bytes, length: int | None, data: bytes
) -> None:
    path = tmp_path / "random.safetensors"
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    size = path.stat().st_size
    try:
        found = read_header(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        return
    assert found.file_bytes == size
    ends = [*(entry.offset for entry in found.entries[1:]), size]
    for entry, end in zip(found.entries, ends, strict=len(found.entries) > 0):
        assert 8 <= found.data_start <= entry.offset <= end <= size


SHAPES = st.lists(st.integers(0, 4), max_size=3)


@given(
    shapes=st.lists(SHAPES, min_size=1, max_size=4),
    flips=st.lists(st.tuples(st.integers(0), st.integers(0, 7)), max_size=2),
)
@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_what_is_accepted_the_format_s_own_library_accepts_too(
    tmp_path: Path, shapes: list[list[int]], flips: list[tuple[int, int]]
) -> None:
    """Whole files, and such with flipped bits in the header: never less strict than the library, and of one mind about
    where data lies."""
    path = tmp_path / "flipped.safetensors"
    save_file({f"t{number}": torch.zeros(shape) for number, shape in enumerate(shapes)}, path)
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    for position, bit in flips:
        content[position % (8 + length)] ^= 1 << bit
    path.write_bytes(content)
    try:
        found = read_header(path)
    except CheckpointError:
        assert flips
        return
    try:
        with safe_open(path, "pt") as library:
            shapes_of_library = {name: library.get_slice(name).get_shape() for name in library.keys()}  # noqa: SIM118
    except SafetensorError as error:
        # The one thing that is left to who asks for the tensor: its format.
        assert "unknown variant" in str(error)
        return
    assert {entry.name: list(entry.shape) for entry in found.entries} == shapes_of_library
