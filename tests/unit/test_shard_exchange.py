"""A newcomer's weights from other ranks, over real sockets. Whatever goes wrong there, what it holds in the end is what
the checkpoint holds."""

import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pytest
import torch

from engine.config import Dtype, LoadFormat, ParallelConfig
from engine.errors import CheckpointError, ProtocolViolation
from engine.executor import shard_peers
from engine.executor.connection_door import ConnectionDoor
from engine.executor.handshake import greet_leader, new_secret
from engine.executor.sealed_link import SealedLink, greeting_secret
from engine.executor.shard_peers import ShardPeers
from engine.executor.shard_server import (
    BLOCK_BYTES,
    MAX_LIST_BYTES,
    PURPOSE,
    WANTED,
    ShardServer,
    block_label,
    held_label,
)
from engine.executor.sockets import connect
from engine.model_config import ModelConfig
from engine.models.registry import Model, build_model
from engine.parallel.mesh import Mesh
from engine.weights.dummy import ProgressCallback
from engine.weights.loader import load_weights
from engine.weights.manifest import manifest_path, write_manifest
from engine.weights.shared_pieces import PieceKeys, Shard, blocks_of, bytes_of
from engine.weights.verification import make_manifest
from tests.support.checkpoints import write_checkpoint

pytestmark = pytest.mark.timeout(60)

CPU = torch.device("cpu")
LOOPBACK = "tcp:127.0.0.1:0"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 2048,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "max_position_embeddings": 128,
    "dtype": "float32",
}
PARALLEL = ParallelConfig(dp=2)
SECRET = new_secret()


def keys_of(rank: int) -> PieceKeys:
    return PieceKeys({}, LoadFormat.SAFETENSORS, Dtype.FLOAT32, None, Mesh(PARALLEL, rank), CPU)


def make_model(directory: Path, rank: int) -> Model:
    return build_model(ModelConfig.from_directory(directory), Mesh(PARALLEL, rank), Dtype.FLOAT32, CPU)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(directory, CONFIG)
    return directory


@pytest.fixture(scope="module")
def held(checkpoint: Path) -> Model:
    """Rank 0's, loaded."""
    model = make_model(checkpoint, 0)
    load_weights(model, checkpoint)
    return model


@pytest.fixture
def server(held: Model) -> Iterator[ShardServer]:
    server = ShardServer(LOOPBACK, SECRET, Shard(held.slices, keys_of(0)))
    yield server
    server.close()


def take(
    checkpoint: Path,
    held: Model,
    *addresses: str,
    secret: str = SECRET,
    on_progress: ProgressCallback = lambda done, total: None,
) -> tuple[int, int]:
    """As rank 1. Returns how many bytes came from others, and how many were wanted; all must be right."""
    model = make_model(checkpoint, 1)
    for piece in model.slices:
        piece.destination.fill_(float("nan"))
    peers = ShardPeers(1, dict(enumerate(addresses, 2)), secret, keys_of(1))
    seen: list[tuple[int, int]] = []

    def note(done: int, total: int) -> None:
        seen.append((done, total))
        on_progress(done, total)

    total = load_weights(model, checkpoint, on_progress=note, fill_from_others=peers.fill)
    for piece, other in zip(model.slices, held.slices, strict=True):
        assert torch.equal(piece.destination, other.destination), piece.name
    assert seen[-1] == (total, total) and seen == sorted(seen)
    return peers.num_bytes, total


def test_all_comes_from_a_rank_that_holds_the_same(
    checkpoint: Path, held: Model, server: ShardServer, caplog: pytest.LogCaptureFixture
) -> None:
    num_bytes, total = take(checkpoint, held, server.address)
    assert num_bytes == total > 2 * BLOCK_BYTES
    assert not caplog.records


def test_several_newcomers_at_once(checkpoint: Path, held: Model, server: ShardServer) -> None:
    taken: list[tuple[int, int]] = []
    threads = [threading.Thread(target=lambda: taken.append(take(checkpoint, held, server.address))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(taken) == 3 and all(num_bytes == total for num_bytes, total in taken)


def test_the_checkpoint_is_read_only_where_weights_are(checkpoint: Path, held: Model, server: ShardServer) -> None:
    """With other ranks' weights a damaged file is not looked at; without them it is refused."""
    file = checkpoint / "model.safetensors"
    original = file.read_bytes()
    broken = original[:-4] + b"\x00\x00\xc0\x7f"  # NaN
    try:
        file.write_bytes(broken)
        with pytest.raises(CheckpointError, match="NaN"):
            take(checkpoint, held)
        num_bytes, total = take(checkpoint, held, server.address)
        assert num_bytes == total
    finally:
        file.write_bytes(original)


def test_hashes_are_checked_of_what_is_read(checkpoint: Path, held: Model, server: ShardServer, tmp_path: Path) -> None:
    """Weights from other ranks were checked where they were read; the other files are this rank's own to read."""
    directory = tmp_path / "checked"
    shutil.copytree(checkpoint, directory)
    manifest, _ = make_manifest(directory, lambda done, total: None)
    write_manifest(manifest_path(directory), manifest)
    file = directory / "model.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-4] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="damaged"):
        take(directory, held)
    with peer_that(dies_in_the_middle, held) as address, pytest.raises(CheckpointError, match="damaged"):
        take(directory, held, address)
    num_bytes, total = take(directory, held, server.address)
    assert num_bytes == total
    config = directory / "config.json"
    config.write_text(config.read_text().replace(" ", "\t", 1))
    with pytest.raises(CheckpointError, match=r"config.json is damaged"):
        take(directory, held, server.address)


@pytest.mark.full
def test_a_process_that_is_killed_while_it_gives(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_checkpoint(tmp_path, CONFIG | {"vocab_size": 32768})
    model = make_model(tmp_path, 0)
    load_weights(model, tmp_path)
    code = f"from tests.unit.test_shard_exchange import serve; serve({str(tmp_path)!r}, {SECRET!r})"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()

        def kill(done: int, total: int) -> None:
            process.kill()
            process.wait()

        try:
            num_bytes, total = take(tmp_path, model, address, on_progress=kill)
        finally:
            process.kill()
    assert 0 < num_bytes < total
    assert "did not give all of its weights" in caplog.text


def serve(directory: str, secret: str) -> None:
    """As rank 0, until it is killed."""
    model = make_model(Path(directory), 0)
    load_weights(model, directory)
    print(ShardServer(LOOPBACK, secret, Shard(model.slices, keys_of(0))).address, flush=True)
    threading.Event().wait()


def test_who_does_not_know_the_secret_gets_nothing(
    checkpoint: Path, held: Model, server: ShardServer, caplog: pytest.LogCaptureFixture
) -> None:
    assert take(checkpoint, held, server.address, secret=new_secret())[0] == 0
    assert "did not give all of its weights" in caplog.text
    # Neither does one that knows the secret, but comes to speak to the leader.
    with connect(server.address, 5.0) as link, pytest.raises((OSError, ProtocolViolation)):
        greet_leader(link, SECRET, [1], 5.0)


def test_nobody_listens_or_the_address_is_none(checkpoint: Path, held: Model, server: ShardServer) -> None:
    """The next one is asked."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    num_bytes, total = take(checkpoint, held, f"tcp:127.0.0.1:{port}", "nonsense", server.address)
    assert num_bytes == total


@dataclass(frozen=True)
class Talk:
    """A newcomer has asked ``question``, which is ``wanted``, and is to be answered."""

    sealed: SealedLink
    link: socket.socket
    question: bytes
    shard: Shard

    @property
    def wanted(self) -> list[bytes]:
        return msgspec.msgpack.decode(self.question, type=list[bytes])

    def promise(self, indexes: Iterable[int]) -> None:
        self.sealed.send(held_label(self.question), msgspec.msgpack.encode(list(indexes)), with_length=True)

    def promise_all(self) -> None:
        self.promise(range(len(self.wanted)))

    def blocks(self, keys: Iterable[bytes]) -> Iterator[tuple[bytes, memoryview]]:
        """Each with its label."""
        for key in keys:
            tensors = self.shard.get(key)
            assert tensors is not None
            for number, block in enumerate(blocks_of(tensors, BLOCK_BYTES)):
                yield block_label(key, number), bytes_of(block)


Give = Callable[[Talk], None]


@contextmanager
def peer_that(give: Give, held: Model) -> Iterator[str]:
    """Knows the secret, and answers as ``give`` does."""
    shard = Shard(held.slices, keys_of(0))
    errors: list[BaseException] = []

    def serve(link: socket.socket, ranks: tuple[int, ...], proof: bytes) -> bool:
        with link:
            try:
                link.sendall(proof)
                sealed = SealedLink(link, SECRET, PURPOSE, 5.0)
                give(Talk(sealed, link, sealed.receive_any(WANTED, MAX_LIST_BYTES), shard))
            except OSError:
                pass  # the newcomer has left
            except BaseException as error:
                errors.append(error)
                raise
        return True

    door = ConnectionDoor([LOOPBACK], greeting_secret(SECRET, PURPOSE), serve)
    yield door.addresses[0]
    door.close()
    assert not errors


def dies_in_the_middle(talk: Talk) -> None:
    talk.promise_all()
    for label, block in talk.blocks(talk.wanted[:5]):
        talk.sealed.send(label, block)
    talk.link.sendall(os.urandom(1000))


def changes_a_byte(talk: Talk) -> None:
    """As somebody on the way might."""
    talk.promise_all()
    near, far = socket.socketpair()
    with near, far:
        for label, block in talk.blocks(talk.wanted):
            received = bytearray()
            reader = threading.Thread(target=read_all, args=(far, received, len(block) + 28))
            reader.start()
            SealedLink(near, SECRET, PURPOSE, 5.0).send(label, block)
            reader.join()
            received[len(received) // 2] ^= 1
            talk.link.sendall(received)


def read_all(link: socket.socket, into: bytearray, num_bytes: int) -> None:
    while len(into) < num_bytes:
        into += link.recv(num_bytes - len(into))


def gives_another_piece(talk: Talk) -> None:
    """Of the same form, rightly sealed, and not what is due."""
    talk.promise_all()
    mine = {key: list(talk.blocks([key])) for key in talk.wanted}
    forms = {key: [len(block) for _, block in found] for key, found in mine.items()}
    for key in talk.wanted:
        other = next((each for each in talk.wanted if each != key and forms[each] == forms[key]), key)
        for label, block in mine[other]:
            talk.sealed.send(label, block)


def gives_too_little(talk: Talk) -> None:
    talk.promise([0])
    label, block = next(talk.blocks(talk.wanted))
    talk.sealed.send(label, block[: len(block) // 2])


def holds_what_nobody_asked_for(talk: Talk) -> None:
    talk.promise([0, len(talk.wanted)])


def claims_a_long_answer(talk: Talk) -> None:
    talk.link.sendall(b"\xff\xff\xff\xff" + os.urandom(64))


def answers_another_question(talk: Talk) -> None:
    replace(talk, question=talk.question + b"x").promise([0])


def talks_nonsense(talk: Talk) -> None:
    talk.sealed.send(held_label(talk.question), b"\xc1", with_length=True)


def is_silent(talk: Talk) -> None:
    talk.promise([0])
    talk.link.recv(1)


def trickles(talk: Talk) -> None:
    """Never silent for long, and never ready."""
    talk.promise_all()
    while True:
        talk.link.sendall(b"\0")
        time.sleep(0.05)


@pytest.mark.parametrize(
    "give",
    [
        dies_in_the_middle,
        changes_a_byte,
        gives_another_piece,
        gives_too_little,
        holds_what_nobody_asked_for,
        claims_a_long_answer,
        answers_another_question,
        talks_nonsense,
        is_silent,
        trickles,
    ],
)
def test_what_a_bad_peer_does_not_give_is_read_from_disk(
    checkpoint: Path, held: Model, give: Give, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_peers, "WAIT_TIMEOUT_S", 1.0)
    monkeypatch.setattr(shard_peers, "LEAST_BYTES_PER_S", 2**30)
    with peer_that(give, held) as address:
        num_bytes, total = take(checkpoint, held, address)
    assert num_bytes < total and (num_bytes > 0) == (give is dies_in_the_middle)
    (record,) = [record for record in caplog.records if record.name == shard_peers.__name__]
    assert record.levelno == logging.WARNING
    assert "rank 1: rank 2 at tcp:127.0.0.1" in record.message and ".weight'" in record.message


def test_the_next_peer_gives_what_the_first_did_not(checkpoint: Path, held: Model, server: ShardServer) -> None:
    with peer_that(dies_in_the_middle, held) as address:
        num_bytes, total = take(checkpoint, held, address, server.address)
    assert num_bytes == total


def test_a_server_that_is_closed_leaves_nobody_waiting(checkpoint: Path, held: Model) -> None:
    """A formation that ends must not wait for a newcomer that reads nothing."""
    server = ShardServer(LOOPBACK, SECRET, Shard(held.slices, keys_of(0)))
    with connect(server.address, 5.0) as link:
        greet_leader(link, greeting_secret(SECRET, PURPOSE), [1], 5.0)
        sealed = SealedLink(link, SECRET, PURPOSE, 5.0)
        wanted = [key for piece in held.slices if (key := keys_of(1).of(piece)) is not None]
        sealed.send(WANTED, msgspec.msgpack.encode(wanted), with_length=True)
        time.sleep(0.3)  # its sending is stuck by now
        began_s = time.monotonic()
        server.close()
        assert time.monotonic() - began_s < 2.0
    assert take(checkpoint, held, server.address)[0] == 0
