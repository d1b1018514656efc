"""Limits of several front ends, in Redis. Time is Redis's own; a bucket is changed by one script at once.

Keys: ``remuda:limit:{TENANT}:requests|tokens`` (hash: level, when, bound) and ``remuda:running:{TENANT}`` (sorted set:
visit of a request, when its lease ends). The braces keep a tenant on one node of a Redis cluster.
"""

from typing import Any, Final
from urllib.parse import quote

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from cluster.tenants.store import LEASE_S, Kind, Level, StoreUnavailable

TIMEOUT_S: Final = 0.5
"""For an answer: without it the request goes on by this front end's own limits."""
MAX_CONNECTIONS: Final = 32
QUEUE_TIMEOUT_S: Final = 2.0
"""Of one front end; who finds all in use waits so long for one: a burst of requests does not mean that it is away."""

_NOW = "local t = redis.call('TIME') local now = t[1] + t[2] / 1000000 "

_BUCKET = (
    _NOW
    + """
local bound, amount, forced = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3] == '1'
local saved = redis.call('HMGET', KEYS[1], 'level', 'at', 'bound')
local level, at = bound, now
if saved[1] then
  local before = tonumber(saved[3])
  at = tonumber(saved[2])
  level = math.min(before, tonumber(saved[1]) + math.max(0, now - at) * before / 60) + bound - before
  at = math.max(at, now)
end
local missing = amount - level
local wait = 0
if missing > 0 and not forced then
  wait = missing * 60 / bound
else
  level = math.min(bound, level - amount)
end
redis.call('HSET', KEYS[1], 'level', string.format('%.6f', level), 'at', string.format('%.6f', at), 'bound', bound)
redis.call('EXPIRE', KEYS[1], math.ceil((bound - level) * 60 / bound) + 60)
return {string.format('%.6f', wait), string.format('%.6f', level)}
"""
)
"""As token_bucket.TokenBucket. A full bucket need not be kept, so it expires a minute after it would be full."""

_ENTER = (
    _NOW
    + """
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
if redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[1]) then return 0 end
redis.call('ZADD', KEYS[1], now + ARGV[3], ARGV[2])
redis.call('EXPIRE', KEYS[1], math.ceil(ARGV[3]) + 60)
return 1
"""
)

_RENEW = (
    _NOW
    + """
for index = 2, #ARGV do redis.call('ZADD', KEYS[1], now + ARGV[1], ARGV[index]) end
redis.call('EXPIRE', KEYS[1], math.ceil(ARGV[1]) + 60)
"""
)
"""Those whose lease has run out, and those that entered while Redis was away or that it has lost, count again."""


def connect(url: str, password: str | None, timeout_s: float = TIMEOUT_S) -> Redis:
    """A client that connects when it is first asked, and again after a loss. Raises ValueError for a bad address."""
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=MAX_CONNECTIONS,
        timeout=max(QUEUE_TIMEOUT_S, timeout_s),
        password=password,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=Retry(NoBackoff(), 0),
        decode_responses=True,
    )
    return Redis.from_pool(pool)


class RedisStore:
    """Implements LimitStore. ``client``: whoever made it closes it."""

    def __init__(self, client: Redis) -> None:
        self._bucket = client.register_script(_BUCKET)
        self._enter = client.register_script(_ENTER)
        self._renew = client.register_script(_RENEW)
        self._client = client

    async def take(self, tenant: str, kind: Kind, per_minute: int, amount: int) -> Level:
        wait_s, level = map(float, await self._change(tenant, kind, per_minute, amount, is_forced=False))
        return Level(wait_s, max(0, int(level)), (per_minute - level) * 60 / per_minute)

    async def give(self, tenant: str, kind: Kind, per_minute: int, amount: int) -> None:
        await self._change(tenant, kind, per_minute, -amount, is_forced=True)

    async def _change(self, tenant: str, kind: Kind, per_minute: int, amount: int, is_forced: bool) -> Any:
        keys, args = [f"remuda:limit:{{{_safe(tenant)}}}:{kind}"], [per_minute, amount, int(is_forced)]
        try:
            return await self._bucket(keys, args)
        except (RedisError, OSError) as error:
            raise StoreUnavailable(str(error)) from error

    async def enter(self, tenant: str, request_id: str, max_running: int) -> bool:
        try:
            return bool(await self._enter([_running_key(tenant)], [max_running, request_id, LEASE_S]))
        except (RedisError, OSError) as error:
            raise StoreUnavailable(str(error)) from error

    async def leave(self, tenant: str, request_id: str) -> None:
        try:
            await self._client.zrem(_running_key(tenant), request_id)
        except (RedisError, OSError) as error:
            raise StoreUnavailable(str(error)) from error

    async def renew(self, tenant: str, request_ids: list[str]) -> None:
        try:
            await self._renew([_running_key(tenant)], [LEASE_S, *request_ids])
        except (RedisError, OSError) as error:
            raise StoreUnavailable(str(error)) from error


def _running_key(tenant: str) -> str:
    return f"remuda:running:{{{_safe(tenant)}}}"


def _safe(tenant: str) -> str:
    """No braces, which would choose another node."""
    return quote(tenant, safe="-_.:@ ")
