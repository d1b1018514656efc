"""A rank as its supervisor reaches it: by its side door."""

import shutil
import uuid
from pathlib import Path

import msgspec
import pytest

from cluster.replica.actor import Rank, RankCall
from cluster.replica.model_source import ModelSource
from cluster.replica.side_door import knock
from engine.executor.channel import ChannelClosed
from engine.executor.handshake import new_secret
from engine.executor.worker_config import WorkerConfig

SECRET = new_secret()


@pytest.fixture(autouse=True)
def environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank changes its own process's."""
    for name in ("TORCH_CPP_LOG_LEVEL", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def tell(rank: Rank, model: Path, epoch: int) -> None:
    config = WorkerConfig(
        rank=0,
        channel_address="",
        secret="",
        model="",
        epoch=epoch,
        store_host="",
        store_port=0,
        bind_address="127.0.0.1",
    )
    call = RankCall(config.encode(), str(model), None)
    knock(rank.door(), SECRET, "form", msgspec.msgpack.encode(call), 30.0)


def test_a_survivor_does_not_look_for_the_checkpoint_again(tmp_path: Path) -> None:
    """What it lay on may be gone by then, or hang; its weights are in memory."""
    model = tmp_path / "model"
    model.mkdir()
    for file in ModelSource("remuda-tiny").directory().iterdir():
        (model / file.name).symlink_to(file)
    ranks = [Rank(f"unix:@remuda-test-{uuid.uuid4().hex}", SECRET) for _ in range(2)]
    survivor, newcomer = ranks
    tell(survivor, model, 0)
    first = survivor._formations.take()
    shutil.rmtree(model)
    tell(survivor, model, 1)
    second = survivor._formations.take()
    assert first is not None and second is not None
    assert (first.model, second.model, second.epoch) == (str(model), str(model), 1)
    with pytest.raises(ChannelClosed, match="not a directory"):
        tell(newcomer, model, 1)
    for rank in ranks:
        rank._door.close()
