"""Where usage adds up: in this front end's memory, or in Redis for all front ends."""

from collections import OrderedDict
from datetime import UTC, datetime
from typing import Final, NamedTuple, Protocol
from urllib.parse import quote, unquote

from redis.asyncio import Redis
from redis.exceptions import RedisError

from cluster.tenants.record import NOTHING, Amounts, UsageRecord, UsageTotal, most
from cluster.tenants.store import StoreUnavailable

MAX_TOTALS: Final = 20_000
"""Days × tenants × keys × models in memory; the oldest days go first."""
KEEP_S: Final = 40 * 86_400
"""How long Redis keeps a day's totals."""
REMEMBER_S: Final = 86_400
"""How long Redis keeps what was counted of a request."""
MAX_REMEMBERED: Final = 100_000
"""Requests of which memory knows what was counted, the latest."""


def day_of(record: UsageRecord) -> str:
    return datetime.fromtimestamp(record.time_unix_s, UTC).strftime("%Y-%m-%d")


class Counted(NamedTuple):
    """``new``: what of a request had not been counted before; ``whole``: what has been now."""

    new: Amounts
    whole: Amounts


class UsageStore(Protocol):
    """Counts every token of a request once, whoever served which part of it, and however often it is counted."""

    @property
    def is_shared(self) -> bool:
        """Whether other front ends count in it too."""
        ...

    async def claim(self, request_id: str, owner: str) -> None:
        """From now on ``owner``, a front end, serves this request, and counts it with what others have to count of it.
        Raises StoreUnavailable, as do all."""
        ...

    async def count(self, record: UsageRecord, owner: str, entry: str) -> Counted | None:
        """What the request was given from its beginning, as far as it is more than was known before. None where nothing
        is new, or another front end serves it. Where the answer was lost, the same ``entry`` gives it again."""
        ...

    async def totals(self, tenant: str | None, days: list[str] | None) -> list[UsageTotal]:
        """Of one tenant, or of all; of these days, or of all."""
        ...


class MemoryUsage:
    """Implements UsageStore."""

    is_shared = False

    def __init__(self) -> None:
        self._totals: dict[tuple[str, str, str, str], UsageTotal] = {}
        self._counted: OrderedDict[str, Amounts] = OrderedDict()

    async def claim(self, request_id: str, owner: str) -> None:
        """There is only one front end."""

    async def count(self, record: UsageRecord, owner: str, entry: str) -> Counted | None:
        before = self._counted.get(record.request_id, NOTHING)
        whole = most(before, record.amounts)
        if whole == before:
            return None
        self._counted[record.request_id] = whole
        if len(self._counted) > MAX_REMEMBERED:
            self._counted.popitem(last=False)
        new = (whole[0] - before[0], whole[1] - before[1], whole[2] - before[2])
        self._total(record).add(new, num_requests=int(before == NOTHING))
        return Counted(new, whole)

    def _total(self, record: UsageRecord) -> UsageTotal:
        key = (day_of(record), record.tenant, record.key_id, record.model)
        total = self._totals.get(key)
        if total is None:
            total = self._totals[key] = UsageTotal(*key)
            if len(self._totals) > MAX_TOTALS:
                del self._totals[min(self._totals)]
        return total

    async def totals(self, tenant: str | None, days: list[str] | None) -> list[UsageTotal]:
        return [
            total
            for key, total in sorted(self._totals.items())
            if (tenant is None or total.tenant == tenant) and (days is None or total.day in days)
        ]


_CLAIM = """
redis.call('HSET', KEYS[1], 'owner', ARGV[1])
redis.call('EXPIRE', KEYS[1], ARGV[2])
"""

_COUNT = """
local saved = redis.call('HMGET', KEYS[1], 'owner', 'entry', 'answer')
if saved[2] == ARGV[2] then return saved[3] end
local is_elsewhere = saved[1] and saved[1] ~= ARGV[1]
local names = {'num_requests', 'num_prompt_tokens', 'num_cached_tokens', 'num_completion_tokens'}
local new, whole = {}, {}
for index, name in ipairs(names) do
  local known = redis.call('HMGET', KEYS[1], name, 'counted:' .. name)
  whole[index] = math.max(tonumber(known[1] or 0), tonumber(ARGV[6 + index]))
  new[index] = whole[index] - tonumber(known[2] or 0)
  redis.call('HSET', KEYS[1], name, whole[index])
end
redis.call('EXPIRE', KEYS[1], ARGV[3])
if is_elsewhere then return false end
for index, name in ipairs(names) do
  redis.call('HSET', KEYS[1], 'counted:' .. name, whole[index])
  if new[index] > 0 then redis.call('HINCRBY', KEYS[2], ARGV[6] .. '|' .. name, new[index]) end
end
local answer = table.concat(new, ' ') .. ' ' .. table.concat(whole, ' ')
redis.call('HSET', KEYS[1], 'entry', ARGV[2], 'answer', answer)
redis.call('HDEL', KEYS[1], 'owner')
if redis.call('EXISTS', KEYS[2]) == 1 then
  redis.call('EXPIRE', KEYS[2], ARGV[4])
  redis.call('SADD', KEYS[3], ARGV[5])
  redis.call('EXPIRE', KEYS[3], ARGV[4])
end
return answer
"""
"""What was given is kept beside what was counted: the owner counts the parts that others have served, too."""


class RedisUsage:
    """Implements UsageStore. Keys: ``remuda:used:{usage}:ID`` (hash: what a request was given, what of it was
    counted, the latest entry and its answer, who serves it), ``remuda:usage:{usage}:DAY`` (hash),
    ``remuda:usage-days:{usage}`` (set)."""

    is_shared = True

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._claim = client.register_script(_CLAIM)
        self._count = client.register_script(_COUNT)

    async def claim(self, request_id: str, owner: str) -> None:
        try:
            await self._claim([_request_key(request_id)], [owner, REMEMBER_S])
        except (RedisError, OSError) as error:
            raise StoreUnavailable(str(error)) from error

    async def count(self, record: UsageRecord, owner: str, entry: str) -> Counted | None:
        day = day_of(record)
        label = "|".join(quote(part, safe="") for part in (record.tenant, record.key_id, record.model))
        keys = [_request_key(record.request_id), _day_key(day), _DAYS_KEY]
        amounts = [int(record.has_used), *record.amounts]
        try:
            answer = await self._count(keys, [owner, entry, REMEMBER_S, KEEP_S, day, label, *amounts])
        except (RedisError, OSError) as error:
            raise StoreUnavailable(str(error)) from error
        if answer is None:
            return None
        _, *new, _, prompt, cached, completion = map(int, answer.split())
        return Counted((new[0], new[1], new[2]), (prompt, cached, completion)) if any(new) else None

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
    return f"remuda:used:{{usage}}:{quote(request_id, safe='-')}"
