"""Processor time that ``remuda serve`` uses while nobody asks it anything: remuda-tiny, two ranks.

Ours: the front end, the control process with the supervisor, the leader, the ranks and Ray's guardian, with the threads
that Ray has inside them; these are shown apart as well. The reference: Ray's own processes in the same seconds.
"""

import asyncio
import os
from pathlib import Path

import psutil

from bench.measure import Row, row
from bench.serving import free_port, remuda_command, serving

MODEL = "remuda-tiny"
_SETTLE_S = 4.0
_OURS = ("remuda: ", "ray::LeaderProcess", "ray::Rank")
_RAY_THREADS = ("worker.io", "client.poll", "server.poll", "nexting_thread", "task_event_buff")
"""Names that Ray gives to threads of each process that is its driver or worker, as far as nobody else has them."""
_NS_PER_S = 1e9

_Thread = tuple[int, bool, str, int]
"""Process, whether it is ours, the thread's name and number."""


def _cpu_ns(pid: int) -> dict[_Thread, int]:
    """Nanoseconds on a processor of each thread of ``pid`` and all its descendants."""
    found: dict[_Thread, int] = {}
    root = psutil.Process(pid)
    for process in [root, *root.children(recursive=True)]:
        try:
            is_ours = process.pid == pid or " ".join(process.cmdline()).startswith(_OURS)
            for thread in map(int, os.listdir(f"/proc/{process.pid}/task")):
                directory = Path(f"/proc/{process.pid}/task/{thread}")
                name = (directory / "comm").read_text().strip()
                used_ns = (directory / "schedstat").read_text().split()[0]
                found[process.pid, is_ours, name, thread] = int(used_ns)
        except (psutil.NoSuchProcess, FileNotFoundError):
            continue  # it has just ended
    return found


async def measure(num_repetitions: int, seconds: float) -> list[Row]:
    port = free_port()
    ours, inside, rays = [], [], []
    async with serving(remuda_command(MODEL, port, "--tp", "2"), f"http://127.0.0.1:{port}/readyz") as pid:
        await asyncio.sleep(_SETTLE_S)
        for _ in range(num_repetitions):
            before = _cpu_ns(pid)
            await asyncio.sleep(seconds)
            used = {key: cpu_ns - before.get(key, 0) for key, cpu_ns in _cpu_ns(pid).items()}
            share = 100 / seconds / _NS_PER_S
            ours.append(share * sum(cpu_ns for (_, is_ours, _, _), cpu_ns in used.items() if is_ours))
            rays.append(share * sum(cpu_ns for (_, is_ours, _, _), cpu_ns in used.items() if not is_ours))
            inside.append(
                share
                * sum(
                    cpu_ns
                    for (_, is_ours, name, _), cpu_ns in used.items()
                    if is_ours and name.startswith(_RAY_THREADS)
                )
            )
    what, reference = f"remuda serve {MODEL} --tp 2", "÷ Ray's own processes"
    return [
        row("idle", what, "% of a core", ours, rays, "lower", reference),
        row("idle", f"{what}: of that, threads of Ray's", "% of a core", inside, rays, "lower", reference),
    ]


def run(num_repetitions: int, quick: bool = False) -> list[Row]:
    return asyncio.run(measure(num_repetitions, 1.0 if quick else 5.0))
