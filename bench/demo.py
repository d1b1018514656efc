"""``make demo``: serve remuda-tiny from two shards on a private Ray, stream an answer over gRPC and one over HTTP, show
where each rank ran and how fast it was, and clean up. Exit status 0 if all of it worked."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

REMUDA = str(Path(sys.executable).parent / "remuda")
GRPC_QUESTION = "My name is Zora. What is my name?"
HTTP_QUESTION = "Who are you?"
READY_TIMEOUT_S = 150.0


def main() -> int:
    started_s = time.monotonic()
    port, grpc_port = _free_port(), _free_port()
    command = [REMUDA, "serve", "remuda-tiny", "--tp", "2", "--ep", "2"]
    command += ["--port", str(port), "--grpc-port", str(grpc_port)]
    _title("$ " + " ".join(["remuda", *command[1:]]))
    server = subprocess.Popen(command)
    try:
        _wait_ready(server, port)
        target = f"127.0.0.1:{grpc_port}"
        _title("$ remuda status")
        subprocess.run([REMUDA, "status", "--target", target], check=True)
        _title(f'gRPC: $ remuda chat "{GRPC_QUESTION}"')
        subprocess.run([REMUDA, "chat", GRPC_QUESTION, "--target", target, "--temperature", "0"], check=True)
        _title(f'HTTP: POST /v1/chat/completions, "{HTTP_QUESTION}"')
        _stream_http(port)
    finally:
        server.send_signal(signal.SIGTERM)
        status = server.wait(60)
    _title(f"served and stopped in {time.monotonic() - started_s:.1f} s, exit status of the server {status}")
    return status


def _title(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _wait_ready(server: "subprocess.Popen[bytes]", port: int) -> None:
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if server.poll() is not None:
            raise SystemExit(f"remuda serve ended with status {server.returncode} before it was ready")
        try:
            if httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=2).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass  # Not listening yet.
        time.sleep(0.1)
    raise SystemExit(f"remuda serve was not ready within {READY_TIMEOUT_S:.0f} s")


def _stream_http(port: int) -> None:
    body: dict[str, Any] = {
        "model": "remuda-tiny",
        "messages": [{"role": "user", "content": HTTP_QUESTION}],
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started_s = time.perf_counter()
    first_s = 0.0
    usage: dict[str, int] = {}
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, timeout=60) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                if text := choice["delta"].get("content"):
                    first_s = first_s or time.perf_counter() - started_s
                    print(text, end="", flush=True)
    total_s = time.perf_counter() - started_s
    num_tokens = usage["completion_tokens"]
    print(f"\n[{num_tokens} tokens, first after {first_s * 1e3:.0f} ms, {num_tokens / total_s:.1f} tokens/s]")


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
