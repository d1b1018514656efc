"""The header's reader against the gguf package's, and what it says of broken files."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from engine.errors import CheckpointError
from engine.gguf.header import read_header
from tests.gguf.files import random_blocks, write_gguf

METADATA = {
    "llama.context_length": 128,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "general.name": "ein Pferd 🐴",
    "tokenizer.ggml.tokens": ["a", "", "ü", "▁the"],
    "tokenizer.ggml.scores": [0.0, -1.5, -2.0, -3.25],
    "tokenizer.ggml.token_type": [1, 2, -3, 4],
    "tokenizer.ggml.add_bos_token": True,
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    generator = np.random.default_rng(0)
    tensors = {
        "vector": ("F32", generator.normal(size=7)),
        "half": ("F16", generator.normal(size=(3, 5))),
        "brain": ("BF16", generator.normal(size=(3, 5))),
        "q8": ("Q8_0", generator.normal(size=(2, 3, 64))),
        **{kind: (kind, random_blocks(kind, (4, 512), generator)) for kind in ("Q4_0", "Q4_K", "Q5_K", "Q6_K")},
    }
    write_gguf(file, "llama", METADATA, tensors, alignment=64)
    return file


def test_metadata_and_tensors_are_those_that_the_gguf_package_reads(path: Path) -> None:
    ours, theirs = read_header(path), gguf.GGUFReader(path)
    expected = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert dict(ours.metadata) == expected
    assert ours.metadata["general.alignment"] == 64
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    data = path.read_bytes()
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.type.name == tensor.tensor_type.name
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        assert mine.offset == tensor.data_offset
        assert mine.type.num_bytes(tensor.n_elements) == tensor.n_bytes
        assert data[mine.offset : mine.offset + tensor.n_bytes] == tensor.data.tobytes()


def test_every_truncation_is_refused_by_name(path: Path, tmp_path: Path) -> None:
    data = path.read_bytes()
    header_bytes = min(tensor.offset for tensor in read_header(path).tensors.values())
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, header_bytes, 13), header_bytes, len(data) - 600]:
        cut.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            read_header(cut)


def test_random_damage_never_gives_another_error(path: Path, tmp_path: Path) -> None:
    data = path.read_bytes()
    header_bytes = min(tensor.offset for tensor in read_header(path).tensors.values())
    generator = np.random.default_rng(1)
    damaged = tmp_path / "damaged.gguf"
    refused = 0
    for _ in range(400):
        changed = bytearray(data)
        for position in generator.integers(0, header_bytes, 4):
            changed[position] = generator.integers(0, 256)
        damaged.write_bytes(changed)
        try:
            read_header(damaged)
        except CheckpointError as error:
            assert "damaged.gguf" in str(error)
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"PK\x03\x04" + bytes(60), "not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(60), "version 1"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(60), "big endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0) + bytes(60), "announces"),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", 77) + bytes(60),
            "'k'",
        ),
    ],
)
def test_what_is_no_such_file_is_refused(tmp_path: Path, head: bytes, message: str) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(head)
    with pytest.raises(CheckpointError, match=message):
        read_header(file)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.gguf cannot be read"):
        read_header(tmp_path / "none.gguf")
