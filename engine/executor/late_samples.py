"""Sampled tokens that stay on the device: the next step takes them from there, and the host reads them when it has
launched that step, so that a GPU does not idle while the host prepares.

What is known of a token before it was read is its place: lengths, positions and block tables follow from that. Its
value is wanted on the host only by penalties, grammars and log-probabilities, whose steps wait, and by the leader.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from engine.config import ParallelConfig
from engine.kernels.host_copy import to_device
from engine.slot_table import UNREAD, ScheduledSlot, SlotTable, UnreadSample


def reads_late(device: torch.device, parallel: ParallelConfig, attention: str) -> bool:
    """Whether a rank works so. On a CPU a step is done when it returns. Between stages the leader passes tokens on, and
    attention replicas wait for one another in every layer. FlashInfer's plan of a step overwrites the pinned memory
    from which that of the step before may still be copied."""
    return device.type == "cuda" and parallel.pp == parallel.dp == 1 and attention != "flashinfer"


class Copied:
    """Everything that was queued on the device's current stream before this was made. On a CPU that is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Blocking: nobody who waits here is on the critical path, so the processor is left to the thread that launches.
        self._event = torch.cuda.Event(blocking=True) if device.type == "cuda" else None
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(device))

    def is_done(self) -> bool:
        return self._event is None or self._event.query()

    def wait(self) -> None:
        """Raises what went wrong on the device."""
        if self._event is not None:
            # A new thread's device is the first one, on which it would make a context that nobody wants.
            with torch.cuda.device(self._device):
                self._event.synchronize()


class Reading:
    """Tokens of one step on their way to the host."""

    def __init__(self, tokens: torch.Tensor, samples: Sequence[UnreadSample]) -> None:
        self._samples = samples
        self._on_host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=tokens.is_cuda)
        self._on_host.copy_(tokens, non_blocking=True)
        self._copied = Copied(tokens.device)

    def is_done(self) -> bool:
        return self._copied.is_done()

    def wait(self) -> list[int]:
        """The tokens, −1 where the logits were unusable. From any thread, any number of times."""
        self._copied.wait()
        token_ids: list[int] = self._on_host.tolist()
        return token_ids

    def take_in(self) -> None:
        """Puts them into the slots' histories, once. Only in the thread that launches."""
        for sample, token_id in zip(self._samples, self.wait(), strict=True):
            sample.fill(max(token_id, 0))


class LateSamples:
    """Of one rank in one epoch. All but ``Reading.wait`` belongs to the thread that launches steps."""

    def __init__(self, slots: SlotTable, num_slots: int, device: torch.device) -> None:
        self._slots = slots
        self._device = device
        self._last = torch.zeros(num_slots, dtype=torch.int64, device=device)
        """[num_slots] the token that was last kept for each slot."""
        self._readings: deque[Reading] = deque()
        self.num_taken = 0
        """Inputs that came from the device."""

    def take_in(self, *, wait: bool) -> None:
        """What has been read by now goes into the slots' histories. ``wait``: all that was sampled."""
        while self._readings and (wait or self._readings[0].is_done()):
            self._readings.popleft().take_in()

    def fill(self, token_ids: torch.Tensor, scheduled: Sequence[ScheduledSlot]) -> None:
        """Puts the inputs that the host has not read into ``token_ids`` [T] int64, on the device. A request has at most
        one such in a step, its last: the one before it was sampled before that was computed."""
        rows, slots, end = [], [], 0
        for share in scheduled:
            end += share.num_tokens
            if share.state.token_ids[share.start + share.num_tokens - 1] == UNREAD:
                rows.append(end - 1)
                slots.append(share.slot)
        if rows:
            places = to_device(np.array((rows, slots), dtype=np.int64), self._device)
            token_ids[places[0]] = self._last[places[1]]
            self.num_taken += len(rows)

    def keep(self, step: int, sampling: Sequence[ScheduledSlot], tokens: torch.Tensor) -> Reading:
        """``tokens`` [R] int64 of the slots that sample, in order; −1, which a slot in error has, counts as 0 in what
        is computed on. Begins to read them."""
        places = to_device(np.array([share.slot for share in sampling], dtype=np.int64), self._device)
        self._last[places] = tokens.clamp(min=0)
        samples = [self._slots.record_unread(step, share.slot) for share in sampling]
        self._readings.append(Reading(tokens, samples))
        return self._readings[-1]
