"""A trace that begins before the gateway goes on through it into the front end: one trace, with the spans of both."""

import asyncio
import secrets
from pathlib import Path

from cluster.rpc.generated.remuda.v1 import inference_pb2, inference_pb2_grpc
from tests.frontend.scripted import says
from tests.gateway.envoy import edge
from tests.gateway.test_envoy import bearer, channel, http
from tests.support.otlp_receiver import OtlpReceiver


async def test_traces_are_joined(tmp_path: Path) -> None:
    client, over_grpc = secrets.token_hex(8), secrets.token_hex(8)
    of_http, of_grpc = secrets.token_hex(16), secrets.token_hex(16)
    with OtlpReceiver() as receiver:
        async with edge(tmp_path, says([300, 301]), receiver.endpoint) as at:
            async with http(at) as to:
                headers = {**bearer(at), "traceparent": f"00-{of_http}-{client}-01"}
                body = {"prompt": "Hi", "max_tokens": 2}
                assert (await to.post("/v1/completions", headers=headers, json=body)).status_code == 200
            async with channel(at) as to_grpc:
                metadata = (*bearer(at).items(), ("traceparent", f"00-{of_grpc}-{over_grpc}-01"))
                call = inference_pb2_grpc.InferenceStub(to_grpc).Generate(
                    inference_pb2.GenerateRequest(text="Hi"), metadata=metadata
                )
                async for _ in call:
                    pass
            for trace_id, caller, name in (
                (of_http, client, "POST /v1/completions"),
                (of_grpc, over_grpc, "remuda.v1.Inference/Generate"),
            ):
                spans = await asyncio.to_thread(receiver.trace, trace_id, [name, "text_completion m"], ["envoy"])
                (root,) = [span for span in spans if span.name == name]
                (of_envoy,) = [span for span in spans if span.service == "envoy"]
                assert (of_envoy.parent, root.parent) == (caller, of_envoy.span_id)
