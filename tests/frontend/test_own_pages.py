"""An open server of this machine, and pages of elsewhere in a browser of this machine."""

from pathlib import Path

import httpx
import pytest

from cluster.errors import PermissionDenied
from cluster.frontend.own_pages import check_own_page
from tests.frontend.bodies import completion
from tests.frontend.scripted import ScriptedBackend, says
from tests.frontend.servers import served

OWN = ("127.0.0.1", "127.0.0.1:8000", "localhost:8000", "LocalHost", "[::1]:8000", "127.5.6.7:1", "remuda.localhost:80")
FOREIGN = (
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example:8000",
    "localhost@evil.example",
    "evil.example@localhost",
    "localhost/.evil.example",
    "0.0.0.0:8000",
    "10.0.0.1",
    "[::1].evil.example",
    "localhost:port",
    "",
    "[",
)


@pytest.mark.parametrize("host", OWN)
def test_own_names(host: str) -> None:
    check_own_page([("host", host), ("origin", f"http://{host}"), ("x", "evil.example")])
    check_own_page([("origin", f"https://{host}")])
    check_own_page([])


@pytest.mark.parametrize("host", FOREIGN)
def test_foreign_names(host: str) -> None:
    with pytest.raises(PermissionDenied, match="127.0.0.1 or localhost"):
        check_own_page([("host", host)])
    with pytest.raises(PermissionDenied, match="127.0.0.1 or localhost"):
        check_own_page([("host", "localhost"), ("host", host)])
    with pytest.raises(PermissionDenied, match="127.0.0.1 or localhost"):
        check_own_page([("host", "localhost"), ("origin", f"http://{host}")])


@pytest.mark.parametrize(
    "origin",
    ["null", "localhost", "file://", "file://localhost", "ws://localhost", "http:localhost", "app://localhost"],
)
def test_origins_that_are_no_page_of_ours(origin: str) -> None:
    with pytest.raises(PermissionDenied, match="not to pages of"):
        check_own_page([("host", "localhost"), ("origin", origin)])


async def test_a_page_of_elsewhere_gets_nothing_done_and_nothing_read() -> None:
    backend = ScriptedBackend(says([300]))
    async with served(backend) as one:
        for headers in ({"host": "evil.example"}, {"origin": "https://evil.example"}, {"origin": "null"}):
            # As a form of another page posts: no preflight asks first.
            posted = {**headers, "content-type": "text/plain"}
            answers = [
                await one.http.post("/v1/completions", json=completion(), headers=posted),
                await one.http.post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "a"}, headers=posted),
                await one.http.post("/api/generate", json={"model": "m"}, headers=posted),
                *[await one.http.get(path, headers=headers) for path in ("/v1/models", "/v1/status", "/console/")],
            ]
            assert {answer.status_code for answer in answers} == {403}, headers
            assert answers[0].json()["error"]["code"] == "permission_denied"
        assert not backend.requests
        own = f"http://localhost:{one.front_end.port}"
        for headers in ({}, {"origin": own}, {"host": "localhost:1", "origin": "http://127.0.0.1:3000"}):
            assert (await one.http.post("/v1/completions", json=completion(), headers=headers)).status_code == 200
            assert (await one.http.get("/console/", headers=headers)).status_code == 200


@pytest.mark.parametrize("is_guarded", [True, False])
async def test_servers_that_others_reach_have_other_names(tmp_path: Path, is_guarded: bool) -> None:
    """Behind a gateway or under --insecure: there keys or the network keep strangers out."""
    path, key = tmp_path / "keys", "alpha-of-the-herd"
    path.write_text(f"{key}\n")
    how = {"key": key, "api_key_file": path} if is_guarded else {"host": "0.0.0.0", "insecure": True}
    elsewhere = {"host": "models.corp", "origin": "https://models.corp"}
    async with served(says([300]), **how) as one:  # type: ignore[arg-type]
        answer: httpx.Response = await one.http.get("/v1/models", headers=elsewhere)
        assert answer.status_code == 200
