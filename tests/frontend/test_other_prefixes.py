"""OpenAI's paths below the prefixes that some clients have."""

from pathlib import Path

import pytest

from tests.frontend.bodies import completion
from tests.frontend.scripted import says
from tests.frontend.servers import served
from tests.identity.test_served_keys import made_key, status_of, with_keys

PREFIXES = ("/openai/v1", "/v1/openai/v1")


@pytest.mark.parametrize("prefix", PREFIXES)
async def test_the_same_routes(prefix: str) -> None:
    async with served(says([300, 301])) as one:
        for path in ("/models", "/models/m", "/usage"):
            assert (await one.http.get(prefix + path)).json() == (await one.http.get(f"/v1{path}")).json()
        body = completion(max_tokens=2)
        own = await one.http.post("/v1/completions", json=body)
        answer = await one.http.post(f"{prefix}/completions", json=body)
        assert answer.status_code == 200 and answer.json()["choices"] == own.json()["choices"]
        for path in (prefix, f"{prefix}/", f"{prefix}/other", f"{prefix}{prefix}/models", f"/x{prefix}/models"):
            assert (await one.http.get(path)).status_code == 404, path
        # Not ours to serve below it.
        assert (await one.http.post(f"{prefix[:-3]}/tokenize", json={})).status_code == 404
        counted = (await one.http.get("/metrics")).text
        assert 'route="/v1/completions"' in counted and "openai" not in counted


@pytest.mark.parametrize("prefix", PREFIXES)
async def test_scopes_hold(prefix: str, tmp_path: Path) -> None:
    keys = {scope: made_key(tmp_path / "keys", "--scope", scope)["key"] for scope in ("infer", "admin")}
    async with served(says([300]), security=with_keys(tmp_path / "keys")) as one:
        for scope, key in (*keys.items(), ("none", None)):
            found = [await status_of(one, prefix + path, key) for path in ("/models", "/status", "/nowhere")]
            assert found == {"infer": [200, 403, 404], "admin": [403, 200, 403], "none": [401] * 3}[scope]


async def test_ends_of_streams() -> None:
    """llama-stack-client 0.2 takes the data of every event for JSON."""
    async with served(says([300, 301])) as one:
        ends = {}
        for prefix in ("/v1", *PREFIXES):
            answer = await one.http.post(f"{prefix}/completions", json=completion(max_tokens=2, stream=True))
            *events, last = [line for line in answer.text.splitlines() if line.startswith("data: ")]
            assert events and "error" not in answer.text
            ends[prefix] = last == "data: [DONE]"
        assert ends == {"/v1": True, "/openai/v1": True, "/v1/openai/v1": False}
