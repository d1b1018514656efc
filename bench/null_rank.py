"""A rank without a model, for measuring a leader: a process on the other end of the real step channel.

    python -m bench.null_rank ADDRESS STEP_S    (the gang's secret on standard input)

It answers each plan STEP_S seconds after it came, with token 7 for every request that wants one. Its results are packed
before they are due, so that they leave at once.
"""

import os
import sys
import time

import msgspec

from engine.executor.channel import ChannelClosed
from engine.executor.socket_rank import SocketRankChannel
from engine.messages import Hello, Loaded, Ready, SampledToken, StepPlan, decode_to_rank, encode

TOKEN_ID = 7
_CACHE_BYTES = 2**40


class _PackedResult(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="result"):
    """StepResult with its list packed already."""

    epoch: int
    step: int
    rank: int
    sampled: msgspec.Raw


class ResultPacker:
    """Results of steps that mostly sample for the same slots."""

    def __init__(self) -> None:
        self._slots: list[int] = []
        self._packed = msgspec.Raw(msgspec.msgpack.encode([]))

    def pack(self, plan: StepPlan) -> bytes:
        """The encoded result of one dp group's plan."""
        slots = [share.slot for share in plan.batches[0].scheduled if share.sample]
        if slots != self._slots:
            self._slots = slots
            self._packed = msgspec.Raw(msgspec.msgpack.encode([SampledToken(slot, TOKEN_ID) for slot in slots]))
        return msgspec.msgpack.encode(_PackedResult(plan.epoch, plan.step, 0, self._packed))


def main() -> None:
    address, step_s = sys.argv[1], float(sys.argv[2])
    channel = SocketRankChannel(address, sys.stdin.read(), [0], 30.0)
    channel.send(encode(Hello(0, 0, os.getpid(), "null", "none")))
    channel.send(encode(Loaded(0, 0, _CACHE_BYTES, 2**20, {})))
    channel.receive(None)
    channel.send(encode(Ready(0, {})))
    packer = ResultPacker()
    try:
        while isinstance(plan := decode_to_rank(channel.receive(None)), StepPlan):
            due_s = time.monotonic() + step_s
            result = packer.pack(plan)
            time.sleep(max(0.0, due_s - time.monotonic()))
            channel.send(result)
    except ChannelClosed:
        pass  # the leader has measured enough


if __name__ == "__main__":
    main()
