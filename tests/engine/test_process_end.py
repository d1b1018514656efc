"""A rank that leaves a gloo operation behind still ends with its own status, and says nothing of C++."""

import subprocess
import sys
from pathlib import Path

import pytest

# The group's destructor waits for an operation that its peer never meets.
_LEAVES_AN_OPERATION = """
import datetime, threading, time
import torch
from torch.distributed import ProcessGroupGloo, TCPStore

server = TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
groups = {}

def join(rank):
    store = TCPStore("127.0.0.1", server.port, 2, False, wait_for_workers=False)
    groups[rank] = ProcessGroupGloo(store, rank, 2, datetime.timedelta(seconds=20))

joining = [threading.Thread(target=join, args=(rank,)) for rank in range(2)]
for thread in joining:
    thread.start()
for thread in joining:
    thread.join()
groups[0].allreduce([torch.ones(4)])
last = [groups.pop(0)]
leaving = threading.Thread(target=last.clear, daemon=True)
leaving.start()
time.sleep(0.2)
assert leaving.is_alive()

from engine.executor.worker_process import end_process
end_process(3)
"""


@pytest.mark.timeout(60)
def test_an_operation_left_behind_does_not_abort_the_process() -> None:
    root = Path(__file__).parents[2]
    ended = subprocess.run(
        [sys.executable, "-c", _LEAVES_AN_OPERATION],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (ended.returncode, "terminate called" in ended.stderr) == (3, False), ended.stderr
