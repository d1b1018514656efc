"""A blocking client of remuda.v1, for the command line: plain values in and out, errors of our tree."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

import grpc

from cluster.errors import Unauthenticated, Unavailable
from cluster.rpc.channel import CLIENT_OPTIONS
from cluster.rpc.generated.remuda.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    common_pb2,
    inference_pb2,
    inference_pb2_grpc,
    replica_pb2,
)
from cluster.rpc.replica_info import adapter_from_proto, replica_info_from_proto
from cluster.rpc.status import error_from_rpc
from cluster.types import ServerStatus
from engine.errors import InvalidOption, RemudaError
from engine.request import AdapterInfo

DUMP_TIMEOUT_S = 60.0


COME_BACK_S = 25.0
"""So long a broken stream is gone on with; leaders keep what nobody reads for a little longer."""
COME_BACK_INTERVAL_S = 0.2
_CANCEL_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class GenerateOptions:
    """What ``remuda generate`` and ``chat`` let the user choose; None is the server's default."""

    model: str = ""
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class TextDelta:
    """More text of the answer, and the ids of its tokens."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Summary:
    """How a stream ended."""

    finish_reason: str
    num_prompt_tokens: int
    num_completion_tokens: int


class InferenceClient:
    """One connection to a server's gRPC address. A context manager.

    Args:
        target: host:port.
        api_key: sent as a bearer token where given.
        timeout_s: bound of the unary calls.
        credentials: for TLS; None speaks plain text.
    """

    def __init__(
        self,
        target: str,
        api_key: str | None = None,
        timeout_s: float = 10.0,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self._target = checked_target(target)
        self._timeout_s = timeout_s
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        if credentials is None:
            self._channel = grpc.insecure_channel(target, options=CLIENT_OPTIONS)
        else:
            self._channel = grpc.secure_channel(target, credentials, options=CLIENT_OPTIONS)
        self._inference = inference_pb2_grpc.InferenceStub(self._channel)
        self._admin = admin_pb2_grpc.AdminStub(self._channel)

    def __enter__(self) -> "InferenceClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def generate(self, text: str, options: GenerateOptions) -> Iterator[TextDelta | Summary]:
        """Stream the continuation of ``text``; the last value is the Summary."""
        return self._stream(inference_pb2.GenerateRequest(text=text), options)

    def chat(self, messages: list[tuple[str, str]], options: GenerateOptions) -> Iterator[TextDelta | Summary]:
        """Stream the answer to (role, content) messages; the last value is the Summary."""
        turns = [inference_pb2.ChatMessage(role=role, content=content) for role, content in messages]
        return self._stream(inference_pb2.GenerateRequest(chat=inference_pb2.Chat(messages=turns)), options)

    def _stream(
        self, request: inference_pb2.GenerateRequest, options: GenerateOptions
    ) -> Iterator[TextDelta | Summary]:
        request.model = options.model
        request.stop.extend(options.stop)
        for name in ("max_tokens", "temperature", "top_p", "seed"):
            if (value := getattr(options, name)) is not None:
                setattr(request.sampling, name, value)
        request.resumable = True
        place = inference_pb2.ChoicePosition()
        reason, request_id, give_up_s = "", "", 0.0
        while True:
            call = self._inference.Generate(request, metadata=self._metadata)
            try:
                for response in call:
                    give_up_s, request_id = 0.0, response.request_id
                    event = response.WhichOneof("event")
                    if event == "delta":
                        place.num_tokens += len(response.delta.token_ids)
                        place.num_characters += len(response.delta.text)
                        yield TextDelta(response.delta.text, tuple(response.delta.token_ids))
                    elif event == "finished":
                        place.finished = True
                        reason = common_pb2.FinishReason.Name(response.finished.reason)
                    elif event == "usage":
                        usage = response.usage
                        yield Summary(_finish_word(reason), usage.num_prompt_tokens, usage.num_completion_tokens)
                        return  # all has come: a connection that breaks before the status takes nothing away
                return
            except grpc.RpcError as error:
                now_s = time.monotonic()
                give_up_s = give_up_s or now_s + COME_BACK_S
                if not (request_id and _may_go_on(error, request.HasField("resume"))) or now_s >= give_up_s:
                    raise self._explained(error) from error
                point = inference_pb2.ResumePoint(request_id=request_id, choices=[place])
                request = inference_pb2.GenerateRequest(resume=point)
            except (GeneratorExit, KeyboardInterrupt):
                self._end_work(request_id)
                raise
            finally:
                call.cancel()
            # gRPC's own backoff spaces out the attempts to connect; this, those that are refused.
            time.sleep(COME_BACK_INTERVAL_S)

    def _end_work(self, request_id: str) -> None:
        """Of a stream that its reader leaves. Where the server cannot be told, it ends the request after a while."""
        if request_id:
            with contextlib.suppress(grpc.RpcError, ValueError):  # ValueError: the channel is closed already
                request = inference_pb2.CancelRequest(request_id=request_id)
                self._inference.Cancel(request, timeout=_CANCEL_TIMEOUT_S, metadata=self._metadata)

    def status(self) -> ServerStatus:
        try:
            answer = self._admin.GetStatus(
                admin_pb2.GetStatusRequest(), timeout=self._timeout_s, metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise self._explained(error) from error
        return ServerStatus(
            model=answer.model,
            version=answer.version,
            draining=answer.draining,
            num_live_requests=answer.num_live_requests,
            num_generated_tokens=answer.num_generated_tokens,
            replicas=tuple(replica_info_from_proto(replica) for replica in answer.replicas),
        )

    def dump(self, replica: str = "") -> Iterator[bytes]:
        """A replica's flight record, in parts; empty: the only one's."""
        request = admin_pb2.DumpReplicaRecordRequest(replica=replica)
        try:
            for part in self._admin.DumpRecord(request, timeout=DUMP_TIMEOUT_S, metadata=self._metadata):
                yield part.data
        except grpc.RpcError as error:
            raise self._explained(error) from error

    def drain(self, replica: str = "") -> int:
        """Start draining; returns the number of requests that still run."""
        try:
            request = admin_pb2.DrainRequest(replica=replica)
            answer = self._admin.Drain(request, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._explained(error) from error
        return int(answer.num_live_requests)

    def adapters(self) -> list[AdapterInfo]:
        """Those that requests can name; their bytes over all replicas."""
        try:
            answer = self._admin.ListAdapters(
                admin_pb2.ListAdaptersRequest(), timeout=self._timeout_s, metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise self._explained(error) from error
        return [adapter_from_proto(adapter) for adapter in answer.adapters]

    def load_adapter(self, name: str, path: str) -> AdapterInfo:
        """However long it takes."""
        try:
            request = replica_pb2.LoadAdapterRequest(name=name, path=path)
            return adapter_from_proto(self._admin.LoadAdapter(request, metadata=self._metadata))
        except grpc.RpcError as error:
            raise self._explained(error) from error

    def unload_adapter(self, name: str) -> None:
        """Waits for the requests that use it."""
        try:
            self._admin.UnloadAdapter(replica_pb2.UnloadAdapterRequest(name=name), metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._explained(error) from error

    def _explained(self, error: grpc.RpcError) -> Exception:
        return explained(error, self._target)


def _may_go_on(error: grpc.RpcError, comes_back: bool) -> bool:
    """Whether the request may run on: it was cut off by the network, or by a front end that died or stops; or it came
    back too soon for its tenant's limits."""
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return comes_back
    return error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


def checked_target(target: str) -> str:
    """``target`` if it is HOST:PORT. Raises InvalidOption."""
    host, _, port = target.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise InvalidOption(f"--target {target}: write HOST:PORT of the server's gRPC API, for example 127.0.0.1:50051")
    return target


def explained(error: grpc.RpcError, target: str) -> RemudaError:
    """What a user of the command line can do about it."""
    known = error_from_rpc(error)
    if isinstance(known, Unauthenticated):
        return Unauthenticated(f"the server at {target} wants an API key; give --api-key-file FILE")
    if error.code() == grpc.StatusCode.UNAVAILABLE and not error.trailing_metadata():
        return Unavailable(
            f"no gRPC API answers at {target}; start one with remuda serve, or give --target HOST:GRPC_PORT"
        )
    return known


def _finish_word(name: str) -> str:
    return name.removeprefix("FINISH_REASON_").lower()
