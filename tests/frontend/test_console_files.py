"""The console's files as they are served and packaged, and the state that it shows, without a browser."""

import re
from pathlib import Path

import httpx
import msgspec
from hatchling.builders.wheel import WheelBuilder

from cluster.frontend.console import files
from cluster.frontend.console.files import HEADERS, PATHS
from cluster.rpc.inference_client import InferenceClient
from cluster.types import RankInfo
from engine.scheduler.expert_stats import ExpertStats
from tests.frontend.scripted import ScriptedBackend, replica_info, says
from tests.frontend.servers import served
from tests.frontend.threaded import serving
from tests.identity.test_served_keys import bearer, guarded, made_key, with_keys

ROOT = Path(__file__).parents[2]
STATIC = Path(files.__file__).with_name("static")
NAMES = sorted(path.name for path in STATIC.iterdir())


async def test_every_file_is_served_with_the_policy_and_kept_until_it_changes() -> None:
    async with served(says([300])) as one:
        page = await one.http.get("/console", follow_redirects=True)
        assert page.url.path == "/console/" and page.content == (STATIC / "index.html").read_bytes()
        for path in PATHS - {"/console"}:
            answer = await one.http.get(path)
            assert answer.status_code == 200
            assert answer.content == (STATIC / (path.removeprefix("/console/") or "index.html")).read_bytes()
            assert {name: answer.headers[name] for name in HEADERS} == HEADERS
            assert (await one.http.head(path)).headers["etag"] == answer.headers["etag"]
            again = await one.http.get(path, headers={"if-none-match": answer.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
            assert again.headers["content-security-policy"] == HEADERS["content-security-policy"]
        assert len(PATHS) == len(NAMES) + 1
        for path in ("/console/files.py", "/console/../files.py", "/console/%2e%2e/files.py", "/console/index.html"):
            assert (await one.http.get(path)).status_code == 404
        assert (await one.http.post("/console/", content=b"")).status_code == 405


def test_nothing_in_the_page_would_need_a_weaker_policy() -> None:
    page = (STATIC / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=|javascript:", page)
    for name in NAMES:
        text = (STATIC / name).read_text()
        places = set(re.findall(r"https?://[^\s\"'<>]+", text))
        assert places <= {"http://www.w3.org/2000/svg"}, name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|\bFunction\(", text)
    used = set(re.findall(r"(?:href|src)=\"([^\"]+)\"", page))
    used |= {found for path in STATIC.glob("*.js") for found in re.findall(r"from \"\./([^\"]+)\"", path.read_text())}
    assert used | {"index.html"} == set(NAMES)


def test_the_wheel_has_them() -> None:
    included = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    assert {f"cluster/frontend/console/static/{name}" for name in NAMES} <= included


async def test_the_page_is_open_and_the_state_is_for_administrators(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    keys = {scope: made_key(path, "--scope", scope)["key"] for scope in ("infer", "admin", "metrics")}
    async with guarded(with_keys(path)) as one:
        assert {(await one.http.get(each, follow_redirects=True)).status_code for each in PATHS} == {200}
        assert (await one.http.get("/v1/status")).status_code == 401
        for scope, status in (("infer", 403), ("admin", 200), ("metrics", 403)):
            assert (await one.http.get("/v1/status", headers=bearer(keys[scope]))).status_code == status


def test_http_and_grpc_say_the_same() -> None:
    experts = ExpertStats(1.25, (5, 3), 1, 0, 2, {1: (1, 2, 3, 2), 3: (0, 4, 2, 2)})
    ranks = (RankInfo(0, 17, "here", "cpu", "busy", 12, "attention", 0.5), RankInfo(1, 18, "there", "cpu", "idle"))
    backend = ScriptedBackend(says([300, 301, 302]))
    backend.infos = [replica_info(experts=experts, ranks=ranks, num_steps=12, kv_cache_usage=0.25, num_running=1)]
    with serving(backend) as one, InferenceClient(f"127.0.0.1:{one.front_end.grpc_port}") as client:
        body = {"prompt": "a", "max_tokens": 3}
        httpx.post(f"{one.url}/v1/completions", json=body).raise_for_status()
        over_http = httpx.get(f"{one.url}/v1/status").json()
        over_grpc = client.status()
    assert over_http["num_generated_tokens"] == over_grpc.num_generated_tokens == 3
    assert over_http["replicas"][0]["experts"]["layers"] == {"1": [1, 2, 3, 2], "3": [0, 4, 2, 2]}
    assert over_grpc.replicas[0].experts == experts
    assert msgspec.json.decode(msgspec.json.encode(over_grpc.as_object())) == over_http
