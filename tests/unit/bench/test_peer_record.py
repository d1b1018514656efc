"""What is kept of how a server was started."""

import sys
from pathlib import Path

import numpy as np
import pytest

from bench.peer_record import precision, speed_variables, started_server, without_paths
from bench.serving import free_port, serving
from tests.gguf.files import write_gguf

SERVER = """
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Page(BaseHTTPRequestHandler):
    def do_GET(self):
        page = {"/health": {}, "/props": {"build_info": "b7-abc"}}.get(self.path)
        self.send_response(404 if page is None else 200)
        self.end_headers()
        self.wfile.write(json.dumps(page).encode())

    def log_message(self, *_):
        pass

HTTPServer(("127.0.0.1", int(sys.argv[1])), Page).serve_forever()
"""


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("/home/me/peers/vllm.sh", "vllm.sh"),
        ("~/peers/vllm.sh", "vllm.sh"),
        ("--model=/models/m1", "--model=m1"),
        ("/opt/tc/libtcmalloc.so.4:/opt/lib/libiomp5.so", "libtcmalloc.so.4:libiomp5.so"),
        ("http://127.0.0.1:80/health", "http://127.0.0.1:80/health"),
        ("models/m1", "models/m1"),
        ("0-1", "0-1"),
    ],
)
def test_paths_of_this_machine_are_not_kept(text: str, kept: str) -> None:
    assert without_paths(text) == kept


def test_variables_that_make_a_server_fast_are_kept() -> None:
    found = speed_variables(
        {
            "VLLM_CPU_OMP_THREADS_BIND": "0-1",
            "VLLM_API_KEY": "secret",
            "LD_PRELOAD": "/a/libtcmalloc.so:/b/libiomp5.so",
            "HOME": "/home/me",
            "OMP_NUM_THREADS": "2",
        }
    )
    assert found == {
        "LD_PRELOAD": "libtcmalloc.so:libiomp5.so",
        "OMP_NUM_THREADS": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "0-1",
    }


@pytest.mark.timeout(120)
async def test_a_script_is_known_by_what_it_became(tmp_path: Path) -> None:
    (tmp_path / "page.py").write_text(SERVER)
    (tmp_path / "start.sh").write_text(
        f"export OMP_NUM_THREADS=2\nexec {sys.executable} {tmp_path}/page.py $1 --dtype bfloat16\n"
    )
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = ["/bin/sh", str(tmp_path / "start.sh"), str(port)]
    async with serving(command, f"{url}/health") as pid:
        found = await started_server(pid, command, url)
    assert found.command == f"{Path(sys.executable).name} page.py {port} --dtype bfloat16"
    assert found.environment["OMP_NUM_THREADS"] == "2"
    assert (found.version, found.precision) == ("b7-abc", "bfloat16")


def test_the_precision_is_that_of_the_weights(tmp_path: Path) -> None:
    tensors = {
        "output.weight": ("Q8_0", np.ones((64, 32), np.float32)),
        "output_norm.weight": ("F32", np.ones((32,), np.float32)),
    }
    write_gguf(tmp_path / "m1.gguf", "llama", {}, tensors)
    assert precision(["llama-server", "-m", str(tmp_path / "m1.gguf")]) == "Q8_0"
    assert precision(["llama-server", "-m", str(tmp_path / "none.gguf")]) is None
    assert precision(["remuda", "serve", "m1", "--dtype", "bfloat16", "--quantization", "int8"]) == "int8"
    assert precision(["vllm", "serve", "m1", "--dtype=bfloat16"]) == "bfloat16"
    assert precision(["some-server", "--port", "81"]) is None
