"""The guardian sleeps until a process that was left to it ends, or its own end comes."""

import subprocess
import sys

BODY = """
import os, subprocess
from cluster.control.ray_guardian import EndOfDuty, become_subreaper, reap
become_subreaper()
end = EndOfDuty()
left = subprocess.run(["/bin/sh", "-c", "sleep 0.3 >/dev/null & echo $!"], capture_output=True).stdout.decode().strip()
assert os.path.exists(f"/proc/{left}")
num_wakes = 0
while not end.wait_for_child():
    reap()
    num_wakes += 1
    if not os.path.exists(f"/proc/{left}"):
        print(num_wakes, flush=True)
"""


def test_it_wakes_for_those_that_end_and_for_nothing_else() -> None:
    guardian = subprocess.Popen(
        [sys.executable, "-c", BODY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert guardian.stdin is not None and guardian.stdout is not None
    line = guardian.stdout.readline()
    guardian.stdin.close()
    assert guardian.wait(30) == 0, guardian.stderr and guardian.stderr.read()
    # The shell, which it waited for itself, and what that left behind.
    assert 1 <= int(line) <= 2
    for stream in (guardian.stdout, guardian.stderr):
        assert stream is not None
        stream.close()
