"""Adapters over HTTP and gRPC: named as models, loaded and unloaded, and only from where the operator allows it."""

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from cluster.rpc.generated.remuda.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc, replica_pb2
from cluster.types import ReplicaState
from engine.errors import AdapterError
from engine.request import AdapterInfo, FinishReason, Output, Request
from tests.frontend.scripted import ScriptedBackend, replica_info
from tests.frontend.servers import Served, served

CONFIG = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}


async def _one_token(request: Request) -> AsyncIterator[Output]:
    yield Output(request.request_id, [300], FinishReason.LENGTH)


class BackendWithAdapters(ScriptedBackend):
    """One replica that loads everything but what is called broken."""

    def __init__(self) -> None:
        super().__init__(_one_token)
        self.loaded: dict[str, AdapterInfo] = {}
        self._show()

    def _show(self) -> None:
        self.infos = [replica_info(adapters=tuple(self.loaded.values()))]

    async def load_adapter(self, name: str, path: str) -> None:
        if path.endswith("broken"):
            raise AdapterError(f"{path} is broken")
        self.loaded[name] = AdapterInfo(name, path, 1000)
        self._show()

    async def unload_adapter(self, name: str) -> None:
        del self.loaded[name]
        self._show()


@pytest.fixture
def lora_dir(tmp_path: Path) -> Path:
    for name in ("allowed/poet", "allowed/broken", "outside"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "allowed" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "allowed" / "dora").mkdir()
    (tmp_path / "allowed" / "dora" / "adapter_config.json").write_text(json.dumps(CONFIG | {"use_dora": True}))
    return tmp_path / "allowed"


async def load(one: Served, name: str, path: str) -> tuple[int, Any]:
    answer = await one.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})
    return answer.status_code, answer.text if answer.is_success else answer.json()["error"]["message"]


async def test_over_http(lora_dir: Path) -> None:
    async with served(BackendWithAdapters(), lora_dir=lora_dir) as one:
        with pytest.raises(Exception, match="'poet' does not exist"):
            await one.openai.completions.create(model="poet", prompt="a", max_tokens=1)
        assert (await load(one, "poet", "poet"))[0] == 200
        assert one.backend.loaded["poet"].path == str(lora_dir / "poet")
        models = (await one.http.get("/v1/models")).json()["data"]
        assert [(model["id"], model.get("parent")) for model in models] == [("m", None), ("poet", "m")]
        assert (await one.http.get("/v1/models/poet")).json()["parent"] == "m"
        for model, adapter in (("poet", "poet"), ("m", "")):
            whole = await one.openai.completions.create(model=model, prompt="a", max_tokens=1)
            assert whole.model == model and one.backend.requests[-1].adapter == adapter
            messages = [{"role": "user", "content": "a"}]
            chunks = await one.openai.chat.completions.create(model=model, messages=messages, max_tokens=1, stream=True)
            assert {chunk.model async for chunk in chunks} == {model}
            assert one.backend.requests[-1].adapter == adapter
        assert (await one.http.post("/v1/unload_lora_adapter", json={"lora_name": "poet"})).status_code == 200
        assert (await one.http.post("/v1/unload_lora_adapter", json={"lora_name": "poet"})).status_code == 404
        assert [model["id"] for model in (await one.http.get("/v1/models")).json()["data"]] == ["m"]


async def test_while_no_replica_is_ready_nobody_knows_what_there_is(lora_dir: Path) -> None:
    """As when a leader is being replaced: the adapter comes back with it, so it is not unknown."""
    async with served(BackendWithAdapters(), lora_dir=lora_dir) as one:
        assert (await load(one, "poet", "poet"))[0] == 200
        (info,) = one.backend.infos
        one.backend.infos = [replace(info, state=ReplicaState.FAILED)]
        for model in ("poet", "m"):
            answer = await one.http.post("/v1/completions", json={"model": model, "prompt": "a", "max_tokens": 1})
            assert answer.status_code == 503 and "retry-after" in answer.headers, model


async def test_what_may_not_be_loaded(lora_dir: Path) -> None:
    (lora_dir / "circle").symlink_to("circle")
    async with served(BackendWithAdapters(), lora_dir=lora_dir, max_lora_rank=16) as one:
        outside = ("../outside", str(lora_dir.parent / "outside"), "link", "/etc", "poet/../../outside")
        for path in (*outside, "a\0b", "a" * 5000, "circle"):
            status, message = await load(one, "x", path)
            assert status == 400 and ("not below the directory" in message or "not a path" in message), path
        for name, path, words in (
            ("x", "none", "no directory 'none'"),
            ("x", "dora", "use_dora"),
            ("x", "broken", "is broken"),
            ("m", "poet", "is the base model's name"),
            ("", "poet", "cannot name an adapter"),
            ("a\nb", "poet", "cannot name an adapter"),
        ):
            status, message = await load(one, name, path)
            assert status == 400 and words in message, message
        (lora_dir / "poet" / "adapter_config.json").write_text(json.dumps(CONFIG | {"r": 32}))
        assert "rank 32 is above the 16" in (await load(one, "x", "poet"))[1]
        assert not one.backend.loaded


async def test_off_unless_allowed(lora_dir: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alpha-of-the-herd\n")
    async with served(BackendWithAdapters()) as one:
        one.backend.loaded["given"] = AdapterInfo("given", "somewhere", 5)
        one.backend._show()
        status, message = await load(one, "poet", str(lora_dir / "poet"))
        assert status == 400 and "--lora-dir" in message
        answer = await one.http.post("/v1/unload_lora_adapter", json={"lora_name": "given"})
        assert answer.status_code == 400 and "given" in one.backend.loaded
    async with served(BackendWithAdapters(), lora_dir=lora_dir, api_key_file=keys) as one:
        assert (await load(one, "poet", "poet"))[0] == 401
        admin = admin_pb2_grpc.AdminStub(one.channel)
        for attempt in (
            admin.ListAdapters(admin_pb2.ListAdaptersRequest()),
            admin.LoadAdapter(replica_pb2.LoadAdapterRequest(name="poet", path="poet")),
            admin.UnloadAdapter(replica_pb2.UnloadAdapterRequest(name="poet")),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await attempt
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_over_grpc(lora_dir: Path) -> None:
    async with served(BackendWithAdapters(), lora_dir=lora_dir) as one:
        admin = admin_pb2_grpc.AdminStub(one.channel)
        loaded = await admin.LoadAdapter(replica_pb2.LoadAdapterRequest(name="poet", path="poet"))
        assert (loaded.name, loaded.num_bytes) == ("poet", 1000)
        listed = await admin.ListAdapters(admin_pb2.ListAdaptersRequest())
        assert [adapter.name for adapter in listed.adapters] == ["poet"]
        stub = inference_pb2_grpc.InferenceStub(one.channel)
        models = (await stub.ListModels(inference_pb2.ListModelsRequest())).models
        assert [(model.id, model.parent) for model in models] == [("m", ""), ("poet", "m")]
        responses = [
            response async for response in stub.Generate(inference_pb2.GenerateRequest(model="poet", text="a"))
        ]
        assert responses[0].started.model == "poet" and one.backend.requests[-1].adapter == "poet"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await admin.LoadAdapter(replica_pb2.LoadAdapterRequest(name="x", path="broken"))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION and "is broken" in caught.value.details()
        await admin.UnloadAdapter(replica_pb2.UnloadAdapterRequest(name="poet"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await admin.UnloadAdapter(replica_pb2.UnloadAdapterRequest(name="poet"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
