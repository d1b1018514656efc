"""A benchmark that is told to end while its server runs."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[3]
BENCHMARK = """
import asyncio, sys
from bench.interrupts import run_main
from bench.serving import free_port, serving

async def measure():
    port = free_port()
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
    async with serving(command, f"http://127.0.0.1:{port}/") as pid:
        print(pid, flush=True)
        await asyncio.Event().wait()

def main():
    asyncio.run(measure())
    return 0

run_main(main)
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("shell", ["exec", 'trap "" INT; exec'], ids=["foreground", "background"])
def test_a_benchmark_that_is_ended_stops_its_server(tmp_path: Path, shell: str) -> None:
    """``trap "" INT``: as a shell starts what it puts in the background."""
    script = tmp_path / "benchmark.py"
    script.write_text(BENCHMARK)
    command = ["/bin/sh", "-c", f'{shell} "$@"', "sh", sys.executable, str(script)]
    # A directory without anything for the server to list.
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        server = psutil.Process(int(process.stdout.readline()))
        try:
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=90)
            assert (process.returncode, errors) == (130, "stopped before its end\n")
            assert not server.is_running()
        finally:
            if server.is_running():
                server.kill()
