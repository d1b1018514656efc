"""A Redis for the tests of this folder; its keys go with each test."""

from collections.abc import AsyncIterator, Iterator

import pytest
from redis.asyncio import Redis

from cluster.tenants.redis_store import connect
from tests.tenants.redis_server import PASSWORD, RedisServer


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One that a test may stop."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
async def redis(shared_redis: RedisServer) -> AsyncIterator[Redis]:
    # On a busy machine an answer may take longer than a front end would wait.
    client = connect(shared_redis.url, PASSWORD, timeout_s=20.0)
    await client.flushall()
    yield client
    await client.aclose()
