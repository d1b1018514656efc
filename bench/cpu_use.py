"""How much CPU a benchmark's own processes used and how much everybody else: disturbed repetitions do not count."""

import os

import psutil


class CpuMeter:
    """CPU seconds since construction, as cores: ours (this process, given ones, their descendants) and others'."""

    def __init__(self, *root_pids: int) -> None:
        """``root_pids``: besides this process, the roots of the process trees that belong to the benchmark."""
        self._roots = {os.getpid(), *root_pids}
        self._machine_s = _machine_busy_s()
        self._own_s = self._own_busy_s()

    def cores(self, elapsed_s: float) -> tuple[float, float]:
        """Cores that ours and others' processes used since construction, ``elapsed_s`` seconds ago."""
        own = max(0.0, self._own_busy_s() - self._own_s) / elapsed_s
        machine = (_machine_busy_s() - self._machine_s) / elapsed_s
        return own, max(0.0, machine - own)

    def _own_busy_s(self) -> float:
        pids = set(self._roots)
        for pid in self._roots:
            try:
                pids |= {child.pid for child in psutil.Process(pid).children(recursive=True)}
            except psutil.NoSuchProcess:
                continue
        return sum(_process_busy_s(pid) for pid in pids)


def _machine_busy_s() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def _process_busy_s(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)
