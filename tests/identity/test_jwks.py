"""When keys are fetched and how long they are trusted, on a clock of the test's own."""

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest

from cluster.errors import Unavailable
from cluster.identity.jwks import MAX_STALE_S, BadKeySet, JwksCache, parse_key_set
from tests.identity.authority import Signer

ONE, TWO = Signer("one", "ES256"), Signer("two", "ES256")


class Issuer:
    """Publishes ``signers``, or is down."""

    def __init__(self) -> None:
        self.signers = [ONE]
        self.is_down = False
        self.num_fetches = 0
        self.now_s = 0.0
        self.wait: Callable[[], Awaitable[None]] | None = None
        self.cache = JwksCache(self.fetch, lambda: self.now_s, max_age_s=300.0, cooldown_s=10.0)

    async def fetch(self) -> bytes:
        self.num_fetches += 1
        if self.wait is not None:
            await self.wait()
        if self.is_down:
            raise OSError("down")
        return json.dumps({"keys": [each.jwk for each in self.signers]}).encode()


async def test_keys_are_fetched_when_needed_and_kept() -> None:
    issuer = Issuer()
    for _ in range(5):
        assert await issuer.cache.find("one") is not None
    assert issuer.num_fetches == 1
    issuer.now_s = 301.0
    await issuer.cache.find("one")
    assert issuer.num_fetches == 2


async def test_a_new_key_is_found_at_once_and_a_withdrawn_one_within_the_age() -> None:
    issuer = Issuer()
    await issuer.cache.find("one")
    issuer.signers, issuer.now_s = [TWO], 20.0
    assert await issuer.cache.find("two") is not None
    assert issuer.num_fetches == 2
    assert await issuer.cache.find("one") is None

    issuer.signers = [ONE]
    issuer.now_s = 20.0 + 301.0
    assert await issuer.cache.find("two") is None, "an old key is not used before newer ones were asked for"


async def test_strangers_cannot_make_us_fetch_more_than_once_in_the_cooldown() -> None:
    issuer = Issuer()
    await issuer.cache.find("one")
    for step in range(100):
        issuer.now_s = step / 10
        assert await issuer.cache.find(f"stranger-{step}") is None
    assert issuer.num_fetches == 1
    issuer.now_s = 10.0
    await issuer.cache.find("stranger")
    assert issuer.num_fetches == 2


async def test_while_the_issuer_is_down_known_keys_stay_for_a_day() -> None:
    issuer = Issuer()
    await issuer.cache.find("one")
    issuer.is_down = True
    issuer.now_s = 400.0
    for _ in range(3):
        assert await issuer.cache.find("one") is not None
    assert issuer.num_fetches == 2
    issuer.now_s = MAX_STALE_S + 1
    with pytest.raises(Unavailable, match="issuer gives no keys"):
        await issuer.cache.find("one")
    issuer.is_down = False
    issuer.now_s += 10.0
    assert await issuer.cache.find("one") is not None


async def test_an_issuer_that_does_not_answer_costs_one_request_its_patience() -> None:
    issuer = Issuer()
    await issuer.cache.find("one")
    issuer.is_down, issuer.now_s = True, 301.0
    await issuer.cache.find("one")
    answers = asyncio.Event()

    async def wait() -> None:
        await answers.wait()

    issuer.wait, issuer.now_s = wait, 311.0
    async with asyncio.timeout(5):
        assert await issuer.cache.find("one") is not None
    await asyncio.sleep(0)
    assert issuer.num_fetches == 3
    issuer.is_down, issuer.signers = False, [TWO]
    answers.set()
    # It waits for the attempt that is under way.
    assert await issuer.cache.find("two") is not None and issuer.num_fetches == 3
    assert await issuer.cache.find("one") is None


async def test_without_keys_nobody_is_told_that_their_token_is_wrong() -> None:
    issuer = Issuer()
    issuer.is_down = True
    with pytest.raises(Unavailable):
        await issuer.cache.find("one")
    with pytest.raises(Unavailable):
        await issuer.cache.find(None)
    assert issuer.num_fetches == 1
    issuer.is_down, issuer.now_s = False, 10.0
    assert await issuer.cache.find("one") is not None


async def test_many_wait_for_one_fetch_and_none_ends_it_by_going_away() -> None:
    issuer = Issuer()
    gate = asyncio.Event()

    async def wait() -> None:
        await gate.wait()

    issuer.wait = wait
    waiting = [asyncio.create_task(issuer.cache.find("one")) for _ in range(10)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.sleep(0)
    gate.set()
    found = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(found[0], asyncio.CancelledError) and all(found[1:]) and issuer.num_fetches == 1
    assert not any(isinstance(each, BaseException) for each in found[1:])


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b'{"keys": 1}', b'{"keys": []}', b'{"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}', b"<html>"],
)
def test_what_is_no_set_of_public_keys(content: bytes) -> None:
    with pytest.raises(BadKeySet):
        parse_key_set(content)


def test_keys_that_cannot_be_used_cost_only_themselves() -> None:
    odd = [{"kty": "RSA"}, {"kty": "new"}, {"kty": "EC", "crv": "?"}, {**TWO.jwk, "use": "enc"}]
    keys = parse_key_set(json.dumps({"keys": [*odd, ONE.jwk]}).encode())
    assert [key.kid for key in keys] == ["one"]
