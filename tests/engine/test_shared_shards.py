"""A rank that takes the place of a lost one has its weights from ranks that hold the same, and from disk only what
nobody else holds."""

from pathlib import Path

import psutil
import pytest
import torch

from engine.config import Dtype, LoadFormat, ParallelConfig
from engine.executor.gang_start import StartMessage
from engine.executor.process_gang import ProcessGang
from engine.executor.shard_peers import in_order_of_kinship
from engine.executor.shard_server import shard_served
from engine.executor.worker_config import WorkerConfig
from engine.messages import Hello, Loaded, LoadProgress
from engine.model_config import ModelConfig
from engine.models.registry import build_model
from engine.parallel.mesh import Mesh
from engine.weights.shared_pieces import PieceKeys, Shard
from tests.parity.reference import Reference
from tests.support.checkpoints import write_checkpoint
from tests.support.gang_engine import ForkedGangEngine, gang_engine, make_request

SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 4096,
    "hidden_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1024,
    "max_position_embeddings": 128,
    "dtype": "float32",
}

pytestmark = pytest.mark.timeout(120)


def run_and_lose(served: ForkedGangEngine, reference: Reference, victim: int) -> dict[str, list[int]]:
    """The rank is killed in the middle; what all requests gave in the end."""
    requests = [make_request(f"r{i}", prompt) for i, prompt in enumerate(reference.prompts)]
    return served.run_with_kills(requests, {4: victim})


def expected_of(reference: Reference) -> dict[str, list[int]]:
    pairs = zip(reference.prompts, reference.generated, strict=True)
    return {f"r{i}": generated.token_ids[len(prompt) :] for i, (prompt, generated) in enumerate(pairs)}


@pytest.mark.parametrize(
    ("layout", "victim"),
    [
        pytest.param({"dp": 2}, 0, id="dp2"),
        pytest.param({"dp": 2, "tp": 2, "depth": 2}, 3, id="dp2-tp2"),
        pytest.param({"dp": 2, "pp": 2}, 1, id="dp2-pp2", marks=pytest.mark.full),
    ],
)
def test_all_of_a_dense_shard_comes_from_its_sibling(dense: Reference, layout: dict[str, int], victim: int) -> None:
    with gang_engine(dense, **layout) as served:
        first = served.gang.ready.loaded
        assert all(each.is_newcomer and each.num_bytes_from_peers == 0 < each.num_bytes_from_disk for each in first)
        survivors = {
            rank: psutil.Process(process.pid) for rank, process in enumerate(served.gang.processes) if rank != victim
        }
        read = {rank: process.io_counters().read_chars for rank, process in survivors.items()}
        assert run_and_lose(served, dense, victim) == expected_of(dense)
        for rank, process in survivors.items():
            assert process.io_counters().read_chars - read[rank] < 2**20
        second = served.gang.ready.loaded
        assert {each.rank for each in second if each.is_newcomer} == {victim}
        assert (second[victim].num_bytes_from_peers, second[victim].num_bytes_from_disk) == whence(first[victim])[::-1]
        assert all(whence(second[rank]) == whence(first[rank]) for rank in survivors)


def test_experts_come_from_disk_and_all_else_from_the_sibling(mixture: Reference) -> None:
    """They are divided among all ranks of a stage: nobody else has these."""
    with gang_engine(mixture, dp=2, ep=2) as served:
        assert run_and_lose(served, mixture, 1) == expected_of(mixture)
        loaded = served.gang.ready.loaded[1]
    config = ModelConfig.from_directory(mixture.directory)
    model = build_model(config, Mesh(ParallelConfig(dp=2, ep=2), 1), Dtype.FLOAT32, torch.device("meta"))
    experts = sum(piece.num_bytes for piece in model.slices if ".experts." in piece.name)
    total = sum(piece.num_bytes for piece in model.slices)
    assert 0 < experts < total
    assert whence(loaded) == (total - experts, experts)


def test_a_tensor_parallel_neighbour_gives_what_it_holds_whole(dense: Reference) -> None:
    """Norms; all else is divided."""
    with gang_engine(dense, tp=2) as served:
        assert run_and_lose(served, dense, 1) == expected_of(dense)
        peers, disk = whence(served.gang.ready.loaded[1])
    model = build_model(
        ModelConfig.from_directory(dense.directory), Mesh(ParallelConfig(tp=2), 1), Dtype.FLOAT32, torch.device("meta")
    )
    norms = sum(piece.num_bytes for piece in model.slices if "norm" in piece.name)
    assert 0 < norms == peers and disk == sum(piece.num_bytes for piece in model.slices) - norms


def test_the_newcomer_reads_next_to_nothing_from_files(tmp_path: Path) -> None:
    """By the kernel's count, from before it met the others to its last weight. At first that was its shard."""
    write_checkpoint(tmp_path, SMALL)
    read: dict[int, int] = {}
    pids: dict[int, int] = {}

    def watch(message: StartMessage) -> None:
        if isinstance(message, Hello):
            pids[message.rank] = message.pid
        elif isinstance(message, Loaded):
            read[message.rank] += psutil.Process(pids[message.rank]).io_counters().read_chars
        elif isinstance(message, LoadProgress) and message.phase == "rendezvous":
            read[message.rank] = -psutil.Process(pids[message.rank]).io_counters().read_chars

    config = WorkerConfig(
        rank=0, channel_address="", secret="", model=str(tmp_path), dp=2, max_num_seqs=2, kv_cache_memory_bytes=2**20
    )
    gang = ProcessGang(config, on_message=watch)
    try:
        shard = gang.ready.loaded[1].num_bytes_from_disk
        assert shard > 16 * 2**20 and all(read[rank] >= shard for rank in (0, 1))
        # The second newcomer has its weights from the first.
        for victim in (1, 0):
            gang.processes[victim].kill()
            gang.processes[victim].wait()
            gang = gang.reform(on_message=watch)
            assert whence(gang.ready.loaded[victim]) == (shard, 0)
            assert read[1 - victim] < 2**20 and read[victim] < shard / 10
    finally:
        gang.close()


def whence(loaded: Loaded) -> tuple[int, int]:
    return loaded.num_bytes_from_peers, loaded.num_bytes_from_disk


def test_siblings_are_asked_first() -> None:
    parallel = ParallelConfig(pp=2, dp=2, tp=2)
    addresses = {rank: f"tcp:127.0.0.1:{rank}" for rank in range(8)}
    assert list(in_order_of_kinship(addresses, 1, parallel)) == [3, 2, 0, 5, 7, 4, 6]
    assert list(in_order_of_kinship({0: "a", 1: "b", 6: "c"}, 1, parallel)) == [0, 6]


def test_where_nobody_can_listen_there_is_no_address(caplog: pytest.LogCaptureFixture) -> None:
    mesh, cpu = Mesh(), torch.device("cpu")
    shard = Shard([], PieceKeys({}, LoadFormat.SAFETENSORS, Dtype.FLOAT32, None, mesh, cpu))
    with shard_served("192.0.2.1", "secret", shard) as address:
        assert address == ""
    assert "cannot give weights" in caplog.text
    with shard_served("127.0.0.1", "secret", None) as address:
        assert address == ""
