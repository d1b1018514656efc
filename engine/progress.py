"""Where a rank is: a few words of shared memory that it writes at every layer and collective and that others read
without asking it, since a rank that hangs cannot answer.

A slot of SLOT_BYTES per rank holds little-endian 64-bit words; engine/kernels/native/marks.h has the same of an axis:

    0 epoch   1 place: step << 24 | layer << 8 | operation   2 when it came there (CLOCK_MONOTONIC, ns)
    3 process id   4 thread id   5 start time of the process (clock ticks since boot)   6 inode of its pid namespace
    8 + 4 a … of axis a: collectives entered, the one that it waits in (0: none), since when (ns), which operation

Each word is written by a single store, so none is ever seen half-written; words may be of different moments.
"""

import ctypes
import enum
import os
import threading
import time

import msgspec

SLOT_BYTES = 256
NUM_WORDS = SLOT_BYTES // 8
NO_LAYER = 0xFFFF
_AXES_AT, _WORDS_PER_AXIS = 8, 4


class Operation(enum.IntEnum):
    """What a rank does, outside of collectives and in them."""

    UNKNOWN = 0
    """It has written nothing yet."""
    IDLE = 1
    """Waits for a plan."""
    BEGIN = 2
    """Takes a plan in: tables, copies, the batch."""
    EMBEDDING = 3
    ATTENTION = 4
    FEED_FORWARD = 5
    LAYER = 6
    """A whole layer in one native call."""
    LOGITS = 7
    SAMPLE = 8
    LOAD_ADAPTER = 9
    ALL_REDUCE = 16
    GATHER = 17
    BROADCAST = 18
    ALL_TO_ALL = 19
    SEND = 20
    """Hidden states to the next stage."""
    RECEIVE = 21
    """Hidden states from the stage before."""

    @property
    def label(self) -> str:
        return self.name.lower().replace("_", "-")


class Axis(enum.IntEnum):
    """Whom a rank waits for: of its mesh, see engine.parallel.mesh.Mesh."""

    TP = 0
    STAGE = 1
    PREVIOUS = 2
    NEXT = 3


class AxisSample(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One axis at one moment. ``entered``: collectives so far. ``waits_in``: the number of the one that this rank waits
    in, 0 where it does not wait. Links count messages: ``entered`` those handed over or taken."""

    entered: int = 0
    waits_in: int = 0
    wait_age_s: float = 0.0
    operation: int = 0


_NOTHING = AxisSample()


class RankSample(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where a rank was when its slot was read.

    ``place_age_s``: since it came there. ``process_state``: of the rank's thread as Linux has it (R, S, D, T, t, Z, X;
    see proc(5)), empty where it is not known. ``cpu_s``: processor time of its process so far. ``report_age_s``: how
    old all this is, where another host reported it.
    """

    rank: int
    epoch: int = 0
    step: int = 0
    layer: int = NO_LAYER
    operation: int = 0
    place_age_s: float = 0.0
    axes: tuple[AxisSample, AxisSample, AxisSample, AxisSample] = (
        AxisSample(),
        AxisSample(),
        AxisSample(),
        AxisSample(),
    )
    process_state: str = ""
    cpu_s: float = 0.0
    report_age_s: float = 0.0

    @property
    def signature(self) -> tuple[int, ...]:
        """Equal as long as the rank has not moved."""
        return (
            self.epoch,
            self.step,
            self.layer,
            self.operation,
            *(count for axis in self.axes for count in (axis.entered, axis.waits_in)),
        )

    @property
    def waits(self) -> bool:
        """In a collective, or for a neighbouring stage."""
        return any(axis.waits_in for axis in self.axes)

    @property
    def place(self) -> str:
        """Layer and operation, for people."""
        waiting = [axis for axis in self.axes if axis.waits_in]
        place = Operation(self.operation).label
        if self.layer != NO_LAYER:
            place += f" of layer {self.layer}"
        if waiting:
            place = f"{Operation(waiting[0].operation).label} {waiting[0].waits_in}, {place}"
        return place

    def describe(self) -> str:
        """With the step."""
        return f"step {self.step}, {self.place}"


def identify(memory: ctypes.Array[ctypes.c_char]) -> None:
    """Write into a slot which process and thread its rank is, so that others can ask the kernel about it."""
    words = memoryview(memory).cast("B").cast("Q")
    words[3], words[4] = os.getpid(), threading.get_native_id()
    words[5], words[6] = start_ticks("self"), os.stat("/proc/self/ns/pid").st_ino


class RankProgress:
    """The writer's side. Until it is attached to shared memory it writes to memory of its own."""

    def __init__(self) -> None:
        self._memory: ctypes.Array[ctypes.c_char] = ctypes.create_string_buffer(SLOT_BYTES)
        self._words = memoryview(self._memory).cast("B").cast("Q")
        self._step = 0

    def attach(self, memory: ctypes.Array[ctypes.c_char], epoch: int) -> None:
        """Go on in another slot: SLOT_BYTES that others read. To be called by the thread that computes; before the
        epoch's collectives are made, since these keep addresses."""
        self._memory = memory
        self._words = memoryview(memory).cast("B").cast("Q")
        self._words[0] = epoch
        identify(memory)
        self.at(Operation.IDLE)

    def begin(self, step: int) -> None:
        """A plan was taken."""
        self._step = step << 24
        self.at(Operation.BEGIN)

    def at(self, operation: Operation, layer: int = NO_LAYER) -> None:
        """Some 0.2 µs."""
        self._words[1] = self._step | layer << 8 | operation
        self._words[2] = time.monotonic_ns()

    def axis(self, axis: Axis) -> "AxisMarks":
        return AxisMarks(self, _AXES_AT + _WORDS_PER_AXIS * axis)


class AxisMarks:
    """Numbers the collectives of one axis."""

    def __init__(self, progress: RankProgress, first_word: int) -> None:
        self._progress = progress
        self._first = first_word
        self._kept: ctypes.Array[ctypes.c_char] | None = None

    @property
    def address(self) -> int:
        """For native code, which then counts by itself; valid as long as this object lives, and of use until the
        progress is attached elsewhere."""
        self._kept = self._progress._memory
        return ctypes.addressof(self._kept) + 8 * self._first

    def enter(self, operation: Operation) -> None:
        """The next collective: what this rank contributes to it is on its way."""
        words = self._progress._words
        words[self._first + 3] = operation
        words[self._first] += 1

    def wait(self, operation: Operation, *, for_next: bool = False) -> None:
        """The rank begins to wait in the collective entered last (``for_next``: for the one after)."""
        words = self._progress._words
        words[self._first + 3] = operation
        words[self._first + 2] = time.monotonic_ns()
        words[self._first + 1] = words[self._first] + for_next

    def resume(self) -> None:
        """It waits no more."""
        self._progress._words[self._first + 1] = 0


def sample_of(rank: int, words: memoryview, now_ns: int) -> RankSample:
    """What stands in a slot (64-bit words), without what is known of the process."""
    epoch, place, place_ns = words[0], words[1], words[2]
    axes = [_axis_of(words, _AXES_AT + _WORDS_PER_AXIS * axis, now_ns) for axis in Axis]
    return RankSample(
        rank,
        epoch,
        place >> 24,
        place >> 8 & 0xFFFF,
        place & 0xFF,
        max(0, now_ns - place_ns) * 1e-9 if place_ns else 0.0,
        (axes[0], axes[1], axes[2], axes[3]),
    )


def _axis_of(words: memoryview, first: int, now_ns: int) -> AxisSample:
    entered, waits_in, since_ns, operation = words[first : first + _WORDS_PER_AXIS]
    return AxisSample(entered, waits_in, max(0, now_ns - since_ns) * 1e-9 if waits_in else 0.0, operation)


def start_ticks(pid: int | str) -> int:
    """When the process began, which with its id names it for good. Raises OSError where there is none."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[19])
