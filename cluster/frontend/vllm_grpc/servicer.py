"""vllm.grpc.engine.VllmEngine: what routers that drive vLLM over gRPC ask, answered by the same service. Methods that
are not here answer UNIMPLEMENTED.
"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from datetime import UTC, datetime
from typing import Any, NoReturn

import grpc

from cluster.errors import Cancelled, Unavailable
from cluster.frontend.calls import Call, Event
from cluster.frontend.embedding import embeddings_of
from cluster.frontend.grpc_stream import Context, until_overdue
from cluster.frontend.http_errors import log_defect
from cluster.frontend.service import Service
from cluster.frontend.vllm_grpc.calls import call_of, embed_call_of
from cluster.frontend.vllm_grpc.form import VllmForm
from cluster.identity.principal import current_principal
from cluster.rpc.generated.vllm import vllm_engine_pb2 as pb
from cluster.rpc.generated.vllm import vllm_engine_pb2_grpc
from cluster.rpc.status import abort

_SERVER_TYPE = "vllm-grpc"
"""Routers take it for the protocol's name."""


class VllmServicer(vllm_engine_pb2_grpc.VllmEngineServicer):
    """Args:
    service: the path of every request.
    ready: whether requests are taken, and why not.
    version: this server's.
    """

    def __init__(self, service: Service, ready: Callable[[], tuple[bool, str]], version: str) -> None:
        self._service = service
        self._ready = ready
        self._version = version
        self._began_s = time.monotonic()
        self._last_request_unix_s = 0.0
        self._calls: dict[tuple[str, str], set[str]] = {}
        """Those that run, by tenant and the client's name for the request."""

    # The stubs know generators only; this form of gRPC's can be left while a write is blocked.
    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:  # type: ignore[override]
        self._last_request_unix_s = time.time()
        try:
            call = call_of(request, context.time_remaining(), self._service.max_model_len)
            form, failed = VllmForm(call, request.stream), asyncio.Event()
            with self._named(request.request_id, call):
                await until_overdue(self._write_all(self._service.generate(call, failed), form, context), failed)
        except Exception as error:  # noqa: BLE001  whatever it is, the client gets a status
            log_defect(error)
            await abort(context, error)

    async def _write_all(self, events: AsyncGenerator[Event, None], form: VllmForm, context: Context) -> None:
        try:
            async with aclosing(events):
                async for event in events:
                    for response in form.responses(event):
                        await context.write(response)
        except Cancelled:
            for response in form.aborted():
                await context.write(response)

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:
        self._last_request_unix_s = time.time()
        try:
            call = embed_call_of(request, context.time_remaining(), self._service.files)
            with self._named(request.request_id, call):
                async with aclosing(self._service.generate(call)) as events:
                    embeddings, usage = embeddings_of(call, [event async for event in events], None)
            values, num_tokens = embeddings[0], usage.num_prompt_tokens
            return pb.EmbedResponse(embedding=values, prompt_tokens=num_tokens, embedding_dim=len(values))
        except Exception as error:  # noqa: BLE001  as above
            log_defect(error)
            await abort(context, error)

    @contextmanager
    def _named(self, name: str, call: Call) -> Iterator[None]:
        """While it runs, ``Abort`` finds it."""
        named = (current_principal().tenant, name)
        self._calls.setdefault(named, set()).add(call.request_id)
        try:
            yield
        finally:
            self._calls[named].discard(call.request_id)
            if not self._calls[named]:
                del self._calls[named]

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        """Of the caller's tenant, those of these names that run here; others are none of ours."""
        tenant = current_principal().tenant
        for name in request.request_ids:
            for call_id in list(self._calls.get((tenant, name), ())):
                self._service.end(call_id, Cancelled("the client had the request aborted"))
        return pb.AbortResponse()

    async def HealthCheck(self, request: pb.HealthCheckRequest, context: Context) -> pb.HealthCheckResponse:
        healthy, why = self._ready()
        return pb.HealthCheckResponse(healthy=healthy, message=why)

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.GetModelInfoResponse:
        try:
            service, files = self._service, self._service.files
            length = service.max_model_len
            config = files.config
            return pb.GetModelInfoResponse(
                # Where it lies on this host is nobody's business.
                model_path=service.name,
                tokenizer_path=service.name,
                served_model_name=service.name,
                is_generation=True,
                max_context_length=length,
                max_req_input_len=length - 1,
                vocab_size=files.vocab_size,
                model_type=str(config.get("model_type", "")),
                architectures=files.architectures,
                eos_token_ids=files.eos_ids,
                bos_token_id=_one_id(config.get("bos_token_id")),
                pad_token_id=_one_id(config.get("pad_token_id")),
                default_sampling_params_json=json.dumps(dict(files.sampling_defaults)),
            )
        except Unavailable as error:
            await abort(context, error)

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> pb.GetServerInfoResponse:
        replicas = self._service.backend.replicas()
        return pb.GetServerInfoResponse(
            active_requests=self._service.admission.num_requests,
            is_paused=self._service.admission.is_closed,
            last_receive_timestamp=self._last_request_unix_s,
            uptime_seconds=time.monotonic() - self._began_s,
            server_type=_SERVER_TYPE,
            data_parallel_size=1,
            block_size=replicas[0].block_size if replicas else 0,
            max_num_seqs=sum(info.max_num_seqs for info in replicas if info.state.takes_requests),
            model_dtype=str(self._service.files.config.get("dtype") or ""),
            constrained_decoding_start="first_token",
        )

    async def GetLoads(self, request: pb.GetLoadsRequest, context: Context) -> pb.GetLoadsResponse:
        """One entry, of rank 0, which is all replicas together."""
        replicas = [info for info in self._service.backend.replicas() if info.state.takes_requests]
        num_running = sum(info.num_running for info in replicas)
        num_waiting = sum(info.num_waiting for info in replicas)
        max_tokens = sum(info.num_blocks * info.block_size for info in replicas)
        used_tokens = sum(info.num_blocks * info.block_size * info.kv_cache_usage for info in replicas)
        max_running = sum(info.max_num_seqs for info in replicas)
        load = pb.SchedulerLoad(
            dp_rank=0,
            num_running_reqs=num_running,
            num_waiting_reqs=num_waiting,
            num_total_reqs=num_running + num_waiting,
            num_used_tokens=round(used_tokens),
            max_total_num_tokens=max_tokens,
            token_usage=used_tokens / max_tokens if max_tokens else 0.0,
            utilization=num_running / max_running if max_running else 0.0,
            max_running_requests=max_running,
        )
        is_wanted = not request.HasField("dp_rank") or request.dp_rank == 0
        return pb.GetLoadsResponse(
            timestamp=datetime.now(UTC).isoformat(),
            version=self._version,
            dp_rank_count=1,
            loads=[load] if is_wanted else [],
        )

    async def _not_served(self, request: object, context: Context) -> NoReturn:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this server does not have this method")
        raise AssertionError("gRPC's abort returned")

    FlushCache: Any = _not_served
    StartProfile: Any = _not_served
    StopProfile: Any = _not_served
    GetTokenizer: Any = _not_served
    SubscribeKvEvents: Any = _not_served


def _one_id(value: object) -> int:
    return value if isinstance(value, int) else 0
