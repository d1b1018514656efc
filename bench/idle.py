"""Processor time that ``remuda serve`` uses while nobody asks it anything: remuda-tiny, two ranks.

What our threads use is told apart from what Ray's threads use inside our processes (the control process, the leader and
the ranks are Ray's driver and actors), by the threads' names. The reference: Ray's own processes in the same seconds.
"""

import asyncio
import os
import statistics
from pathlib import Path

import psutil

from bench.measure import Row, row
from bench.serving import free_port, remuda_command, serving

MODEL = "remuda-tiny"
_TITLE = f"idle, remuda serve {MODEL} --tp 2"
_SETTLE_S = 10.0
FRONT_END, LEADER, CONTROL, RANKS = "front end", "leader", "control process and guardian", "ranks"
SHOWN = {FRONT_END: (FRONT_END,), "leader and ranks": (LEADER, RANKS), CONTROL: (CONTROL,)}
RAY = "Ray"
"""A process of Ray's own, or a thread of Ray's in one of ours."""
_TITLES = {
    "remuda: leader": LEADER,
    "remuda: rank": RANKS,
    "remuda: ": CONTROL,
    "ray::LeaderProcess": LEADER,
    "ray::Rank": RANKS,
}
"""How titles of ours begin, the first that fits. Leader and ranks have Ray's until they give themselves one."""
_RAY_THREADS = ("worker.io", "client.poll", "server.poll", "nexting_thread", "task_event_buff")
"""Names that Ray gives to threads of each process that is its driver or worker, as far as nobody else has them."""
_GRPC_THREADS = ("timer_manager", "grpc_global_tim", "grpcpp_sync_ser", "event_engine", "lifeguard")
"""Names that gRPC gives to its threads. Front end and leader have a gRPC of ours, so these count as ours there."""
_WITHOUT_OUR_GRPC = (CONTROL, RANKS)
_PERCENT_PER_NS = 100 / 1e9
_NOTES = "÷ Ray's own processes; in all: our threads and Ray's in our processes"

_Thread = tuple[str, str, int]
"""Part, name and number; the part is RAY in Ray's own processes."""


def part_of(title: str) -> str:
    """Of a process other than the front end, by its command line."""
    return next((part for beginning, part in _TITLES.items() if title.startswith(beginning)), RAY)


def owner(part: str, name: str) -> str:
    """``part``, or RAY where a thread of this name is not ours there."""
    is_rays = name.startswith(_RAY_THREADS) or (part in _WITHOUT_OUR_GRPC and name.startswith(_GRPC_THREADS))
    return RAY if is_rays else part


def _cpu_ns(pid: int) -> dict[_Thread, int]:
    """Nanoseconds on a processor of each thread of ``pid`` and all its descendants."""
    found: dict[_Thread, int] = {}
    root = psutil.Process(pid)
    for process in [root, *root.children(recursive=True)]:
        try:
            part = FRONT_END if process.pid == pid else part_of(" ".join(process.cmdline()))
            for thread in map(int, os.listdir(f"/proc/{process.pid}/task")):
                directory = Path(f"/proc/{process.pid}/task/{thread}")
                name = (directory / "comm").read_text().strip()
                used_ns = (directory / "schedstat").read_text().split()[0]
                found[part, name, thread] = int(used_ns)
        except (psutil.NoSuchProcess, FileNotFoundError):
            continue  # it has just ended
    return found


async def measure(num_repetitions: int, seconds: float) -> list[Row]:
    port = free_port()
    ours: list[dict[str, float]] = []
    inside, rays = [], []
    async with serving(remuda_command(MODEL, port, "--tp", "2"), f"http://127.0.0.1:{port}/readyz") as pid:
        await asyncio.sleep(_SETTLE_S)
        for _ in range(num_repetitions):
            before = _cpu_ns(pid)
            await asyncio.sleep(seconds)
            own = dict.fromkeys((FRONT_END, LEADER, CONTROL, RANKS), 0.0)
            within, without = 0.0, 0.0
            for (part, name, thread), cpu_ns in _cpu_ns(pid).items():
                used = _PERCENT_PER_NS / seconds * (cpu_ns - before.get((part, name, thread), 0))
                if part == RAY:
                    without += used
                elif owner(part, name) == RAY:
                    within += used
                else:
                    own[part] += used
            ours.append(own)
            inside.append(within)
            rays.append(without)
    return rows_of(ours, inside, rays)


def rows_of(ours: list[dict[str, float]], inside: list[float], rays: list[float]) -> list[Row]:
    threads = [sum(own.values()) for own in ours]
    by_case = {
        "our processes in all": [own + rays_own for own, rays_own in zip(threads, inside, strict=True)],
        "our threads": threads,
        **{
            f"our threads, {shown}": [sum(own[part] for part in parts) for own in ours]
            for shown, parts in SHOWN.items()
        },
        "Ray's threads in our processes": inside,
    }
    return [
        row(_TITLE, f"{case}: {_plain(values)}", "% of a core", values, rays, "lower", _NOTES)
        for case, values in by_case.items()
    ]


def _plain(values: list[float]) -> str:
    """What a target is held against: the ratio to Ray's own processes says nothing about it."""
    return f"{statistics.median(values):.2f} % of a core ({min(values):.2f} to {max(values):.2f})"


def run(num_repetitions: int, quick: bool = False) -> list[Row]:
    return asyncio.run(measure(num_repetitions, 1.0 if quick else 5.0))
