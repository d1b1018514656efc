"""Nobody learns from the prefix cache what another tenant has sent."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cluster.frontend.calls import Call, TextPrompt
from cluster.frontend.journal import FailoverPolicy, Journal, Submit
from cluster.frontend.stored_call import FoundCall, StoredCall
from cluster.identity.config import SecurityConfig
from cluster.identity.principal import ANONYMOUS, Principal, acting_as
from cluster.router.query import RoutingQuery
from cluster.router.replica_table import ReplicaView
from cluster.rpc.generated.remuda.v1 import inference_pb2, inference_pb2_grpc
from cluster.tenants.tenancy import Tenancy, TenancyConfig
from engine.errors import RankFailure
from engine.request import Output, Request, SamplingParams
from tests.frontend.bodies import completion
from tests.frontend.real_engine import RealBackend
from tests.frontend.scripted import replica_info, says
from tests.frontend.servers import TINY, Served, served
from tests.tenants.front_ends import bearer, key_of

PROMPT = "The herd came down from the hills before the first snow, and nobody had counted the horses."
BLOCK_SIZE = 4
TENANTS = """
tenants:
  c: {cache_group: both}
  d: {cache_group: both}
"""


class Watched(RealBackend):
    """With all requests that it was given, and how many tokens each found in the cache."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.requests: list[Request] = []
        self.num_cached: dict[str, int] = {}

    async def generate(
        self, request: Request, keep: object = None, holder: object = None
    ) -> AsyncGenerator[Output, None]:
        self.requests.append(request)
        async for output in super().generate(request, keep, holder):
            found = max(self.num_cached.get(request.request_id, 0), output.num_cached_tokens)
            self.num_cached[request.request_id] = found
            yield output


@asynccontextmanager
async def front_end(folder: Path, script: Any, names: str = "", **changes: Any) -> AsyncIterator[tuple[Served, Any]]:
    """With keys of these tenants; without any, open."""
    keys = {name: bearer(key_of(folder, name)) for name in names}
    if keys:
        changes["security"] = SecurityConfig.model_validate({"api_keys": {"file": folder / "keys"}})
    (folder / "tenants.yaml").write_text(TENANTS)
    async with served(script, tenancy=TenancyConfig(folder / "tenants.yaml"), **changes) as one:
        yield one, keys


async def cached(one: Served, headers: Any, **more: Any) -> int:
    """Tokens of the prompt that the cache had."""
    body = completion(prompt=PROMPT, max_tokens=1, temperature=0, **more)
    answer = await one.http.post("/v1/completions", headers=headers, json=body)
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


async def test_a_tenants_prefixes_are_its_own(tmp_path: Path) -> None:
    backend: Any = Watched(TINY)
    try:
        async with front_end(tmp_path, backend, "abcd") as (one, keys):
            a, b, c, d = (keys[name] for name in "abcd")
            assert await cached(one, a) == 0
            whole = await cached(one, a)
            assert whole >= 3 * BLOCK_SIZE
            assert await cached(one, b) == 0, "what a has sent is not b's to know"
            assert await cached(one, b) == whole
            # A salt of its own divides what a tenant has, and guessing another's opens nothing.
            assert [await cached(one, a, cache_salt="s") for _ in range(2)] == [0, whole]
            assert await cached(one, b, cache_salt="s") == 0
            assert await cached(one, b, cache_salt=backend.requests[0].cache_salt) == 0
            assert [await cached(one, c), await cached(one, d)] == [0, whole], "one group"

            chat = {"model": "m", "input": PROMPT, "max_output_tokens": 1, "store": False}
            for headers, expects in ((a, False), (a, True), (b, False)):
                answer = await one.http.post("/v1/responses", json=chat, headers=headers)
                details = answer.json()["usage"]["input_tokens_details"]
                assert (details["cached_tokens"] > 0) == expects
            stub = inference_pb2_grpc.InferenceStub(one.channel)
            asked = inference_pb2.GenerateRequest(text="Another beginning that is long enough for several blocks.")
            for headers, expects in ((a, False), (a, True), (b, False)):
                call = stub.Generate(asked, metadata=tuple(headers.items()))
                counts = [each.usage.num_cached_tokens async for each in call if each.HasField("usage")]
                assert (counts[-1] > 0) == expects
        assert_hashed_alike(backend)
    finally:
        backend.close()


def assert_hashed_alike(backend: Any) -> None:
    """What a router takes for cached at the one replica is what the engine had."""
    seen: set[bytes] = set()
    for request in backend.requests:
        query = RoutingQuery(request.token_ids, adapter=request.adapter, cache_salt=request.cache_salt)
        hashes = query.block_hashes(BLOCK_SIZE)
        known = next((index for index, each in enumerate(hashes) if each not in seen), len(hashes))
        seen.update(hashes)
        most = (len(request.token_ids) - 1) // BLOCK_SIZE  # one token at least is computed
        assert backend.num_cached[request.request_id] == min(known, most) * BLOCK_SIZE, request.cache_salt


async def test_without_authentication_there_is_nobody_to_keep_apart(tmp_path: Path) -> None:
    backend: Any = Watched(TINY)
    try:
        async with front_end(tmp_path, backend) as (one, _):
            assert await cached(one, {}) == 0 < await cached(one, {})
            assert await cached(one, {}, cache_salt="s") == 0
        assert [request.cache_salt for request in backend.requests] == ["", "", "s"]
    finally:
        backend.close()


async def test_who_comes_back_for_a_request_computes_the_rest_of_it_under_the_same_salt(tmp_path: Path) -> None:
    """At another front end, of sequences that no leader has any more."""
    alice = Principal("c", "k1", "key", frozenset({"infer"}))
    bob = Principal("c", "k2", "key", frozenset({"infer"}))
    call = Call(request_id="q", prompts=[TextPrompt(PROMPT)], cache_salt="mine")
    async with front_end(tmp_path, says([300, 301])) as (first, _), front_end(tmp_path, says([300])) as (second, _):
        kept = StoredCall("completion", "q", b"", 0.0, seeds=[1], max_tokens=[2])
        with acting_as(alice):
            async for _ in first.front_end.service.generate(call, stored=kept):
                pass
        with acting_as(bob):
            found = FoundCall(msgspec.structs.replace(kept, tenant="c"), {})
            async for _ in second.front_end.service.resume(call, found):
                pass
    (one,), (other,) = first.backend.requests, second.backend.requests
    assert one.cache_salt == other.cache_salt
    assert one.cache_salt == Tenancy(TenancyConfig(tmp_path / "tenants.yaml")).cache_salt(alice, "mine")


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_a_replay_keeps_the_salt(num_tokens: int) -> None:
    salt = Tenancy().cache_salt(Principal("a", "k", "key", frozenset()), "s")
    assert salt != Tenancy().cache_salt(ANONYMOUS, "s") == "s"
    request = Request("r", [1, 2], 2, SamplingParams(9), cache_salt=salt)
    journal = Journal(request, FailoverPolicy())
    journal.sent("r0", 1, "r")
    if num_tokens:
        journal.take(Output("r", list(range(num_tokens))))
    journal.lost(RankFailure("rank 1 died", rank=1), 0.0)
    action = journal.next_action(0.0, [ReplicaView(replica_info(id="r1"))])
    assert isinstance(action, Submit) and action.request.cache_salt == salt
    assert len(action.request.token_ids) == 2 + num_tokens
