"""A rank without a model, for measuring a leader: a process on the other end of the real step channel.

    python -m bench.null_rank ADDRESS STEP_S    (the gang's secret on standard input)

It answers each plan STEP_S seconds after it came, with token 7 for every request that wants one. Its results are packed
before they are due, so that they leave at once.
"""

import os
import sys
import time

from engine.executor.channel import ChannelClosed
from engine.executor.socket_rank import SocketRankChannel
from engine.messages import Hello, Loaded, Ready, StepPlan, StepResult, decode_to_rank, encode
from engine.packed import pack

TOKEN_ID = 7
_CACHE_BYTES = 2**40


def pack_result(plan: StepPlan) -> bytes:
    """The encoded result of one dp group's plan."""
    slots = plan.batches[0].sampling_slots
    result = StepResult(plan.epoch, plan.step, 0, slots=pack(slots), token_ids=pack([TOKEN_ID] * len(slots)))
    return encode(result)


def main() -> None:
    address, step_s = sys.argv[1], float(sys.argv[2])
    channel = SocketRankChannel(address, sys.stdin.read(), [0], 30.0)
    channel.send(encode(Hello(0, 0, os.getpid(), "null", "none")))
    channel.send(encode(Loaded(0, 0, _CACHE_BYTES, 2**20, {})))
    channel.receive(None)
    channel.send(encode(Ready(0, {})))
    try:
        while isinstance(plan := decode_to_rank(channel.receive(None)), StepPlan):
            due_s = time.monotonic() + step_s
            result = pack_result(plan)
            time.sleep(max(0.0, due_s - time.monotonic()))
            channel.send(result)
    except ChannelClosed:
        pass  # the leader has measured enough


if __name__ == "__main__":
    main()
