"""Processor time that ``remuda serve`` uses while nobody asks it anything: remuda-tiny, two ranks.

Ours: the front end, the control process with the supervisor, the leader, the ranks and Ray's guardian, with the threads
that Ray has inside them. The reference: Ray's own processes in the same seconds.
"""

import asyncio
import os

import psutil

from bench.measure import Row, row
from bench.serving import free_port, remuda_command, serving

MODEL = "remuda-tiny"
_SETTLE_S = 4.0
_OURS = ("remuda: ", "ray::LeaderProcess", "ray::Rank")
_NS_PER_S = 1e9


def _cpu_ns(pid: int) -> dict[tuple[int, bool, int], int]:
    """(Process, whether it is ours, thread) → nanoseconds on a processor, of ``pid`` and all its descendants."""
    found: dict[tuple[int, bool, int], int] = {}
    root = psutil.Process(pid)
    for process in [root, *root.children(recursive=True)]:
        try:
            is_ours = process.pid == pid or " ".join(process.cmdline()).startswith(_OURS)
            for thread in map(int, os.listdir(f"/proc/{process.pid}/task")):
                with open(f"/proc/{process.pid}/task/{thread}/schedstat") as file:
                    found[process.pid, is_ours, thread] = int(file.read().split()[0])
        except (psutil.NoSuchProcess, FileNotFoundError):
            continue  # it has just ended
    return found


async def measure(num_repetitions: int, seconds: float) -> list[Row]:
    port = free_port()
    ours, rays = [], []
    async with serving(remuda_command(MODEL, port, "--tp", "2"), f"http://127.0.0.1:{port}/readyz") as pid:
        await asyncio.sleep(_SETTLE_S)
        for _ in range(num_repetitions):
            before = _cpu_ns(pid)
            await asyncio.sleep(seconds)
            used = {key: cpu_ns - before.get(key, 0) for key, cpu_ns in _cpu_ns(pid).items()}
            share = 100 / seconds / _NS_PER_S
            ours.append(share * sum(cpu_ns for (_, is_ours, _), cpu_ns in used.items() if is_ours))
            rays.append(share * sum(cpu_ns for (_, is_ours, _), cpu_ns in used.items() if not is_ours))
    return [row("idle", f"remuda serve {MODEL} --tp 2", "% of a core", ours, rays, "lower", "÷ Ray's own processes")]


def run(num_repetitions: int, quick: bool = False) -> list[Row]:
    return asyncio.run(measure(num_repetitions, 1.0 if quick else 5.0))
