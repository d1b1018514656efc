"""Mutual TLS between a front end's client and a leader's server, with the cluster's own authority."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from cryptography import x509

from cluster.errors import Unavailable
from cluster.identity.cluster_tls import CLUSTER_NAME, ClusterTls
from cluster.identity.config import ClusterConfig
from cluster.replica.client import ReplicaClient
from cluster.replica.engine_loop import EngineLoop
from cluster.replica.server import LeaderServer
from engine.errors import InvalidOption
from tests.identity.authority import Authority, write_pair
from tests.support.leader_bed import INFO, WAIT_S, collect, request, tokens_of, until
from tests.support.scripted_engine import ScriptedEngine, answer


def files(directory: Path, authority: Authority, name: str = CLUSTER_NAME) -> ClusterTls:
    """Of one host, written anew."""
    directory.mkdir(exist_ok=True)
    certificate, key = write_pair(directory, "own", authority.issue("host", x509.DNSName(name)))
    (directory / "ca.crt").write_bytes(authority.pem)
    return ClusterTls(str(certificate), str(key), str(directory / "ca.crt"))


@asynccontextmanager
async def leader(tls: ClusterTls, bind: str = "127.0.0.1:0") -> AsyncIterator[str]:
    engine = ScriptedEngine()
    server = LeaderServer(EngineLoop(engine), INFO, bind, credentials=tls.server_credentials())
    address = await server.start()
    try:
        yield address
    finally:
        engine.gate.set()
        await server.stop(WAIT_S)


@asynccontextmanager
async def client_of(address: str, tls: ClusterTls | None) -> AsyncIterator[ReplicaClient]:
    client = ReplicaClient(address, "front-end", tls=tls, randomness=random.Random(0))
    try:
        yield client
    finally:
        await client.close()


async def test_members_of_one_cluster_reach_each_other(tmp_path: Path) -> None:
    authority = Authority()
    ours, theirs = files(tmp_path / "a", authority), files(tmp_path / "b", authority)
    async with leader(theirs) as address, client_of(address, ours) as client:
        await client.connect(WAIT_S)
        assert tokens_of(await collect(client, request("a"))) == answer(request("a"))
        assert (await client.info()).id == INFO.id


async def test_others_do_not(tmp_path: Path) -> None:
    authority, other = Authority(), Authority()
    ours, foreign = files(tmp_path / "a", authority), files(tmp_path / "b", other)
    mixed = msgspec.structs.replace(foreign, ca_file=ours.ca_file)
    strangers = {"plain text": None, "another authority": foreign, "its certificate": mixed}
    async with leader(ours) as address:
        for tls in strangers.values():
            async with client_of(address, tls) as client:
                with pytest.raises(Unavailable, match="no leader answers"):
                    await client.connect(0.5)


async def test_a_leader_of_another_name_is_none(tmp_path: Path) -> None:
    authority = Authority()
    ours, theirs = files(tmp_path / "a", authority), files(tmp_path / "b", authority, "somebody")
    async with leader(theirs) as address, client_of(address, ours) as client:
        with pytest.raises(Unavailable, match="no leader answers"):
            await client.connect(0.5)


async def test_both_ends_take_renewed_certificates(tmp_path: Path) -> None:
    """A front end that lives on reaches the next leader with what its files say by then."""
    old, new = Authority(), Authority()
    ours, theirs = files(tmp_path / "a", old), files(tmp_path / "b", old)
    async with leader(theirs) as address, client_of(address, ours) as client:
        await client.connect(WAIT_S)
        assert files(tmp_path / "b", new) == theirs
        async with client_of(address, files(tmp_path / "c", new)) as newcomer:
            await newcomer.connect(WAIT_S)
        assert tokens_of(await collect(client, request("a"))) == answer(request("a")), "open connections stay"
    async with client_of(address, ours) as client, leader(theirs, address):
        with pytest.raises(Unavailable):
            await client.connect(0.5)
        files(tmp_path / "a", new)
        await until(lambda: client.is_connected)


def test_files_are_checked_before_anything_starts(tmp_path: Path) -> None:
    paths = {"certificate_file": tmp_path / "c", "key_file": tmp_path / "k", "ca_file": tmp_path / "ca"}
    assert ClusterTls.of(None) is None
    with pytest.raises(InvalidOption, match="cannot be read"):
        ClusterTls.of(ClusterConfig(**paths))
