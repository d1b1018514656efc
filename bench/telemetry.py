"""``python -m bench.telemetry``: what tracing one request costs its front end and its leader, in CPU time, with a
collector and without. Spans go to a receiver in another process, so that its work is not counted."""

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from cluster.frontend.attempts import Attempts
from cluster.frontend.call_trace import CallTrace
from cluster.frontend.calls import Call, TextPrompt, Usage
from cluster.replica.request_spans import record
from cluster.telemetry import names
from cluster.telemetry.propagation import context_of, serving
from cluster.telemetry.tracing import Telemetry, open_telemetry
from engine.executor.rank_times import RankTimes
from engine.request import FinishReason, Output
from engine.timeline import Timeline

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
CALL = Call("cmpl-1", [TextPrompt("")])
CLOCK = RankTimes(16).moment


class _Sink(trace_service_pb2_grpc.TraceServiceServicer):
    def Export(
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        return trace_service_pb2.ExportTraceServiceResponse()


def _serve_sink(port_to: Connection) -> None:
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(_Sink(), server)  # type: ignore[no-untyped-call]
    port_to.send(server.add_insecure_port("127.0.0.1:0"))
    server.start()
    server.wait_for_termination()


def front_end(telemetry: Telemetry, header: str) -> None:
    """The spans of one request with one sequence, as the front end makes them."""
    tracer = telemetry.tracer
    with serving(tracer, "POST /v1/completions", context_of([("traceparent", header)] if header else [])) as span:
        call = CallTrace(tracer, CALL, "m", context_of([("traceparent", header)] if header else []))
        for name in (names.ADMISSION, names.TOKENIZE, names.TOKEN_BUDGET):
            with call.part(name):
                pass
        attempts = Attempts(tracer, call.header)
        attempts.routing()
        attempts.sent("r0", "cmpl-1.0", 0)
        attempts.close(100)
        call.ended("completed", 200, Usage(1, 1, 0), [], 0.0)
        if span.is_recording():
            span.set_attribute(names.HTTP_STATUS, 200)


def leader(telemetry: Telemetry, header: str) -> None:
    """What its engine and its server do for one request of a gang of 16 ranks."""
    timeline = Timeline(CLOCK, header)
    timeline.begin()
    timeline.answer()
    record(telemetry.tracer, "r0", Output("cmpl-1.0", [], FinishReason.LENGTH), timeline.end())


def cpu_us(work: Callable[[Telemetry, str], None], telemetry: Telemetry, header: str, num_requests: int) -> float:
    """CPU time of this process per request, the exporter's thread included; µs. Requests come at 500 a second, so that
    none is dropped."""
    began_s = time.process_time()
    for number in range(num_requests):
        work(telemetry, header)
        if number % 10 == 9:
            time.sleep(0.02)
    telemetry.close()
    return (time.process_time() - began_s) / num_requests * 1e6


def main() -> None:
    """Prints one line per case, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    ours, theirs = multiprocessing.Pipe()
    sink = multiprocessing.get_context("spawn").Process(target=_serve_sink, args=(theirs,), daemon=True)
    sink.start()
    endpoint = f"http://127.0.0.1:{ours.recv()}"
    figures: dict[str, float] = {}
    for process, work in (("front end", front_end), ("leader", leader)):
        idle = cpu_us(lambda *_: None, Telemetry(), "", arguments.requests)
        for case, where, header in (("off", None, ""), ("on", endpoint, TRACEPARENT)):
            telemetry = open_telemetry(where, "bench", "one")
            figures[f"{process}, {case}"] = round(cpu_us(work, telemetry, header, arguments.requests) - idle, 1)
    sink.terminate()
    if arguments.json:
        print(json.dumps({"us_per_request": figures}))
    else:
        for case, value in figures.items():
            print(f"{case}: {value} µs of CPU per request")


if __name__ == "__main__":
    main()
