"""Manifests: what they hold against the standard library, what damage they find, and the check while loading."""

import hashlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import engine.weights.load_check as load_check
from engine.errors import CheckpointError
from engine.weights.checkpoint import Checkpoint
from engine.weights.hashing import sha256_of
from engine.weights.load_check import HostShare, LoadCheck, open_manifest
from engine.weights.manifest import MANIFEST_FILE, Manifest, covered_files, manifest_path, read_manifest, write_manifest
from engine.weights.verification import Damage, describe, find_damage, make_manifest
from tests.gguf.files import write_gguf

CHUNK_BYTES = 4096


def quiet(done: int, total: int) -> None:
    """Nobody watches."""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two shards of some chunks each, and small files."""
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for shard, names in (("model-1.safetensors", "ab"), ("model-2.safetensors", "cde")):
        save_file({name: torch.randn(30, 100, generator=generator) for name in names}, tmp_path / shard)
        weight_map |= dict.fromkeys(names, shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_bytes(os.urandom(CHUNK_BYTES + 1))
    (tmp_path / "empty.json").touch()
    (tmp_path / "README.md").write_text("not covered")
    return tmp_path


def add_manifest(checkpoint: Path) -> Manifest:
    manifest, damage = make_manifest(checkpoint, quiet, CHUNK_BYTES)
    assert damage == []
    write_manifest(manifest_path(checkpoint), manifest)
    return manifest


def damage_of(checkpoint: Path) -> list[Damage]:
    return find_damage(checkpoint, read_manifest(manifest_path(checkpoint)), quiet)


def flip(path: Path, *offsets: int) -> None:
    content = bytearray(path.read_bytes())
    for offset in offsets:
        content[offset] ^= 1
    path.write_bytes(content)


def data_offset(path: Path, tensor: str) -> int:
    """First byte of a tensor, read from the file without our help."""
    content = path.read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    return 8 + header_bytes + int(json.loads(content[8 : 8 + header_bytes])[tensor]["data_offsets"][0])


def test_it_holds_the_hashes_of_files_and_chunks(checkpoint: Path) -> None:
    manifest = add_manifest(checkpoint)
    assert read_manifest(manifest_path(checkpoint)) == manifest
    names = ["config.json", "empty.json", "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"]
    assert sorted(manifest.files) == [*names, "tokenizer.json"]
    for name, record in manifest.files.items():
        content = (checkpoint / name).read_bytes()
        assert (record.size, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())
        chunks = [content[begin : begin + CHUNK_BYTES] for begin in range(0, len(content), CHUNK_BYTES)]
        assert list(record.chunks) == [hashlib.sha256(chunk).hexdigest() for chunk in chunks]
    assert damage_of(checkpoint) == []


def test_progress_reaches_the_total(checkpoint: Path) -> None:
    seen: list[tuple[int, int]] = []
    make_manifest(checkpoint, lambda done, total: seen.append((done, total)), CHUNK_BYTES)
    # Whole files, and once more by chunks.
    total = 2 * sum(path.stat().st_size for path in covered_files(checkpoint))
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)


def test_one_flipped_bit_is_found_and_its_tensors_named(checkpoint: Path) -> None:
    add_manifest(checkpoint)
    path = checkpoint / "model-2.safetensors"
    offset = data_offset(path, "d") + 6000
    flip(path, offset)
    (damage,) = damage_of(checkpoint)
    assert (damage.file, damage.kind) == (path.name, "content")
    assert damage.begin <= offset < damage.end == damage.begin + CHUNK_BYTES
    assert damage.tensors == ("d",)
    assert describe(damage) == f"model-2.safetensors differs in bytes {damage.begin} to {damage.end}: d"


def test_neighbouring_chunks_are_one_range(checkpoint: Path) -> None:
    add_manifest(checkpoint)
    path = checkpoint / "model-2.safetensors"
    size = path.stat().st_size
    flip(path, *range(data_offset(path, "d"), size, 1000))
    (damage,) = damage_of(checkpoint)
    assert (damage.end, damage.tensors[-2:]) == (size, ("d", "e"))


def test_a_broken_header_names_what_the_index_has(checkpoint: Path) -> None:
    add_manifest(checkpoint)
    flip(checkpoint / "model-2.safetensors", 9)
    (damage,) = damage_of(checkpoint)
    assert (damage.begin, damage.tensors) == (0, ("(header)", "c", "d", "e"))


def test_missing_extra_and_resized_files_are_named(checkpoint: Path) -> None:
    add_manifest(checkpoint)
    (checkpoint / "model-1.safetensors").unlink()
    (checkpoint / "chat_template.jinja").write_text("")
    (checkpoint / "config.json").write_text("{ }")
    found = damage_of(checkpoint)
    assert [(damage.file, damage.kind) for damage in found] == [
        ("model-1.safetensors", "missing"),
        ("chat_template.jinja", "extra"),
        ("config.json", "size"),
    ]
    assert describe(found[2]) == "config.json has 3 bytes; the manifest says 2"


def test_the_hubs_cache_is_compared_with_its_own_hashes(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The cache's links lead to blobs named by SHA-256, small files' by Git's hash."""
    cache = tmp_path_factory.mktemp("cache")
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for path in covered_files(checkpoint):
        content = path.read_bytes()
        name = hashlib.sha256(content).hexdigest()
        if path.suffix == ".json":
            name = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        (blobs / name).write_bytes(content)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", name))
    assert make_manifest(snapshot, quiet)[1] == []
    for name in ("model-1.safetensors", "tokenizer.json"):
        flip((snapshot / name).resolve(), 5000 if name.endswith("s") else 7)
    damage = make_manifest(snapshot, quiet)[1]
    assert [item.file for item in damage] == ["model-1.safetensors", "tokenizer.json"]
    assert damage[0].tensors == ("(header)", "a", "b")


def test_damage_in_a_gguf_file_names_its_tensors(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    tensors = {name: ("F32", np.zeros((64, 64), np.float32)) for name in ("one", "two", "three")}
    write_gguf(model, "llama", {"general.name": "pony"}, tensors)
    add_manifest(model)
    two = next(tensor for tensor in gguf.GGUFReader(model).tensors if tensor.name == "two")
    flip(model, int(two.data_offset) + 8000)
    (damage,) = damage_of(model)
    assert damage.tensors == ("two",)
    flip(model, 0)
    assert damage_of(model)[0].tensors == ("(header)",)


def test_a_single_file_has_its_manifest_beside_it(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(os.urandom(3 * CHUNK_BYTES))
    add_manifest(model)
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf", f"model.gguf.{MANIFEST_FILE}"}
    flip(model, CHUNK_BYTES)
    assert damage_of(model) == [
        Damage("model.gguf", "content", "differs in bytes 4096 to 8192", CHUNK_BYTES, 2 * CHUNK_BYTES, ("(header)",))
    ]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"chunk_bytes": 4096}',
        b'{"chunk_bytes": 0, "files": {}}',
        b'{"chunk_bytes": 4096, "files": {}, "version": 2}',
        b'{"chunk_bytes": 4096, "files": {"../a": {"size": 0, "sha256": "%s", "chunks": []}}}' % (b"0" * 64),
        b'{"chunk_bytes": 4096, "files": {"a": {"size": 0, "sha256": "%s", "chunks": []}}}' % (b"x" * 64),
        b'{"chunk_bytes": 4096, "files": {"a": {"size": 1, "sha256": "%s", "chunks": []}}}' % (b"0" * 64),
        b"[" * 100_000,
    ],
)
def test_what_is_not_a_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / MANIFEST_FILE
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="delete it and run remuda verify anew"):
        read_manifest(path)


def test_writing_is_all_or_nothing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = add_manifest(checkpoint)
    before = manifest_path(checkpoint).read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match=r"cannot be written \(No space left on device\); .*--manifest"):
        write_manifest(manifest_path(checkpoint), manifest)
    assert manifest_path(checkpoint).read_bytes() == before
    assert not list(checkpoint.glob(".remuda-*"))


def run_check(checkpoint: Path, needed: str, share: HostShare = HostShare()) -> None:
    files = Checkpoint(checkpoint)
    entries = [files.entry(name, (30, 100)) for name in needed]
    with LoadCheck(checkpoint, open_manifest(checkpoint), entries, share) as check:
        check.finish()


def test_loading_checks_what_is_needed(checkpoint: Path) -> None:
    add_manifest(checkpoint)
    path = checkpoint / "model-2.safetensors"
    offset = data_offset(path, "d") + 6000
    flip(path, offset)
    run_check(checkpoint, "abce")
    first = offset // CHUNK_BYTES * CHUNK_BYTES
    message = f"{path} is damaged in bytes {first} to {first + CHUNK_BYTES}, by the manifest: tensor 'd'; download it"
    with pytest.raises(CheckpointError, match=message):
        run_check(checkpoint, "abcde")


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("needed", ["abcde", "d", "ae"])
def test_the_ranks_of_a_host_hash_every_needed_chunk_once(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, count: int, needed: str
) -> None:
    manifest = add_manifest(checkpoint)
    hashed: list[tuple[str, int]] = []

    def noting(path: Path, begin: int, end: int) -> str:
        hashed.append((path.name, begin // CHUNK_BYTES))
        return sha256_of(path, begin, end)

    monkeypatch.setattr(load_check, "sha256_of", noting)
    for index in range(count):
        run_check(checkpoint, needed, HostShare(index, count))
    expected = {
        (name, chunk)
        for name, record in manifest.files.items()
        if name.endswith(".json")
        for chunk in range(len(record.chunks))
    }
    for name in needed:
        file = "model-1.safetensors" if name in "ab" else "model-2.safetensors"
        begin = data_offset(checkpoint / file, name)
        chunks = {offset // CHUNK_BYTES for offset in range(begin, begin + 30 * 100 * 4)} | {0}
        expected |= {(file, chunk) for chunk in chunks}
    assert sorted(hashed) == sorted(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: os.truncate(d / "model-2.safetensors", 100), "model-2.safetensors has 100 bytes; the manifest says"),
        (
            lambda d: (d / "tokenizer.json").unlink(),
            "tokenizer.json is in the manifest and cannot be read: No",
        ),
        (lambda d: (d / MANIFEST_FILE).write_text("{"), f"{MANIFEST_FILE} is not a manifest"),
    ],
)
def test_sizes_are_compared_before_anything_is_read(
    checkpoint: Path, change: Callable[[Path], object], message: str
) -> None:
    add_manifest(checkpoint)
    change(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        open_manifest(checkpoint)


def test_a_weight_file_that_the_manifest_lacks_is_refused(checkpoint: Path) -> None:
    manifest = add_manifest(checkpoint)
    files = {name: record for name, record in manifest.files.items() if name != "model-1.safetensors"}
    write_manifest(manifest_path(checkpoint), Manifest(CHUNK_BYTES, files))
    with pytest.raises(CheckpointError, match="model-1.safetensors is not in the manifest; .* delete"):
        run_check(checkpoint, "ae")


def test_damaged_small_files_fail_the_load_too(checkpoint: Path) -> None:
    add_manifest(checkpoint)
    flip(checkpoint / "tokenizer.json", CHUNK_BYTES)
    with pytest.raises(CheckpointError, match="tokenizer.json is damaged in bytes 4096 to 4097"):
        run_check(checkpoint, "a")


def test_without_a_manifest_nothing_is_hashed(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(load_check, "sha256_of")
    assert open_manifest(checkpoint) is None
    run_check(checkpoint, "abcde")


def test_the_thread_ends_with_the_load(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when loading fails for another reason, at the end of the chunk in hand."""
    add_manifest(checkpoint)
    hashed: list[str] = []
    began = threading.Event()
    entries = [Checkpoint(checkpoint).entry("a", (30, 100))]
    check = LoadCheck(checkpoint, open_manifest(checkpoint), entries, HostShare())

    def waiting(path: Path, begin: int, end: int) -> str:
        hashed.append(path.name)
        began.set()
        assert check._is_stopped.wait(30)
        return sha256_of(path, begin, end)

    monkeypatch.setattr(load_check, "sha256_of", waiting)
    with pytest.raises(ZeroDivisionError), check:
        assert began.wait(30)
        raise ZeroDivisionError
    assert len(hashed) == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "hash-check"]
