"""Where usage adds up: in this front end's memory, or in Redis for all front ends."""

from datetime import UTC, datetime
from typing import Final, Protocol
from urllib.parse import quote, unquote

from redis.asyncio import Redis
from redis.exceptions import RedisError

from cluster.tenants.record import UsageRecord, UsageTotal
from cluster.tenants.store import StoreUnavailable

MAX_TOTALS: Final = 20_000
"""Days × tenants × keys × models in memory; the oldest days go first."""
KEEP_S: Final = 40 * 86_400
"""How long Redis keeps a day's totals."""
REMEMBER_S: Final = 86_400


def day_of(record: UsageRecord) -> str:
    return datetime.fromtimestamp(record.time_unix_s, UTC).strftime("%Y-%m-%d")


class UsageStore(Protocol):
    """Counts each request id once."""

    async def claim(self, request_id: str, owner: str) -> None:
        """From now on ``owner``, a front end, serves this request; who did before does not count it any more."""
        ...

    async def count(self, record: UsageRecord, owner: str) -> bool:
        """False: another front end has counted or claimed it. May be repeated where the answer was lost."""
        ...

    async def totals(self, tenant: str | None, days: list[str] | None) -> list[UsageTotal]:
        """Of one tenant, or of all; of these days, or of all."""
        ...


class MemoryUsage:
    """Implements UsageStore."""

    def __init__(self) -> None:
        self._totals: dict[tuple[str, str, str, str], UsageTotal] = {}

    async def claim(self, request_id: str, owner: str) -> None:
        """There is only one front end."""

    async def count(self, record: UsageRecord, owner: str) -> bool:
        key = (day_of(record), record.tenant, record.key_id, record.model)
        if key not in self._totals:
            self._totals[key] = UsageTotal(*key)
            if len(self._totals) > MAX_TOTALS:
                del self._totals[min(self._totals)]
        self._totals[key].add(record)
        return True

    async def totals(self, tenant: str | None, days: list[str] | None) -> list[UsageTotal]:
        return [
            total
            for key, total in sorted(self._totals.items())
            if (tenant is None or total.tenant == tenant) and (days is None or total.day in days)
        ]


_COUNT = """
local owner, counted = redis.call('GET', KEYS[1]), 'counted:' .. ARGV[1]
if owner == counted then return 1 end
if owner and owner ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], counted, 'EX', ARGV[2])
redis.call('SADD', KEYS[3], ARGV[4])
redis.call('EXPIRE', KEYS[3], ARGV[3])
for index = 5, #ARGV, 2 do redis.call('HINCRBY', KEYS[2], ARGV[index], ARGV[index + 1]) end
redis.call('EXPIRE', KEYS[2], ARGV[3])
return 1
"""

_FIELDS = ("num_requests", "num_prompt_tokens", "num_cached_tokens", "num_completion_tokens")


class RedisUsage:
    """Implements UsageStore. Keys: ``remuda:counted:{usage}:ID`` (who serves it; ``counted:`` and who
    counted it), ``remuda:usage:{usage}:DAY`` (hash), ``remuda:usage-days:{usage}`` (set)."""

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._count = client.register_script(_COUNT)

    async def claim(self, request_id: str, owner: str) -> None:
        try:
            await self._client.set(_request_key(request_id), owner, ex=REMEMBER_S)
        except (RedisError, OSError) as error:
            raise StoreUnavailable(str(error)) from error

    async def count(self, record: UsageRecord, owner: str) -> bool:
        day = day_of(record)
        label = "|".join(quote(part, safe="") for part in (record.tenant, record.key_id, record.model))
        amounts = (1, record.num_prompt_tokens, record.num_cached_tokens, record.num_completion_tokens)
        changes = [item for name, amount in zip(_FIELDS, amounts, strict=True) for item in (f"{label}|{name}", amount)]
        keys = [_request_key(record.request_id), _day_key(day), _DAYS_KEY]
        try:
            return bool(await self._count(keys, [owner, REMEMBER_S, KEEP_S, day, *changes]))
        except (RedisError, OSError) as error:
            raise StoreUnavailable(str(error)) from error

    async def totals(self, tenant: str | None, days: list[str] | None) -> list[UsageTotal]:
        found: dict[tuple[str, str, str, str], UsageTotal] = {}
        try:
            known = {str(day) for day in await self._client.smembers(_DAYS_KEY)}
            for day in sorted(known if days is None else known.intersection(days)):
                for field, value in (await self._client.hgetall(_day_key(day))).items():
                    *parts, name = str(field).split("|")
                    key = (day, *map(unquote, parts))
                    assert len(key) == 4
                    if tenant is None or key[1] == tenant:
                        setattr(found.setdefault(key, UsageTotal(*key)), name, int(value))
        except (RedisError, OSError) as error:
            raise StoreUnavailable(str(error)) from error
        return [found[key] for key in sorted(found)]


_DAYS_KEY = "remuda:usage-days:{usage}"


def _day_key(day: str) -> str:
    return f"remuda:usage:{{usage}}:{day}"


def _request_key(request_id: str) -> str:
    return f"remuda:counted:{{usage}}:{quote(request_id, safe='-')}"
