"""A long cable: frames that enter at one end leave at the other after a delay. Standard library only: starts quickly.

``python wire.py PORT TAP DELAY_S`` joins the network device PORT and a new TAP device of the given name, in the network
namespace that it runs in. Prints a line once it carries frames; ends with SIGTERM.

Both ends exchange frames with a virtio header before each, so that checksums and segmentation that the kernel has
deferred stay deferred; without it TCP over a veth pair would be dropped for its unfinished checksums.
"""

import contextlib
import errno
import fcntl
import os
import select
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable

TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6 = 0x01, 0x02, 0x04
SOL_PACKET = 263
PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 15, 23
SO_RCVBUFFORCE, SO_SNDBUFFORCE = 33, 32
ETH_P_ALL = 3
MAX_FRAME_BYTES = 70_000
BUFFER_BYTES = 64 * 2**20
FRAMES_AT_ONCE = 64


def open_tap(name: str) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
    fcntl.ioctl(descriptor, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6)
    return descriptor


def open_port(name: str) -> socket.socket:
    port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    port.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    port.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    port.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
    port.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, BUFFER_BYTES)
    port.bind((name, ETH_P_ALL))
    port.setblocking(False)
    return port


class OneWay:
    """Frames on their way in one direction."""

    def __init__(self, read: Callable[[], bytes], write: Callable[[bytes], int], delay_s: float) -> None:
        self._read = read
        self._write = write
        self._delay_s = delay_s
        self._frames: deque[tuple[float, bytes]] = deque()

    def take(self) -> None:
        """Whatever has arrived, up to a bound: the other direction wants its turn."""
        for _ in range(FRAMES_AT_ONCE):
            try:
                frame = self._read()
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.ENETDOWN):  # The port is down: the cable is pulled.
                    raise
                return
            self._frames.append((time.monotonic() + self._delay_s, frame))

    def deliver(self) -> float | None:
        """Hand over what is due. Seconds until the next is, None where none is on its way."""
        while self._frames:
            left_s = self._frames[0][0] - time.monotonic()
            if left_s > 0:
                return left_s
            # As a real cable: where the other end is down, or its queue is full, the frame is lost.
            with contextlib.suppress(OSError):
                self._write(self._frames[0][1])
            self._frames.popleft()
        return None


def main(port_name: str, tap_name: str, delay_s: float) -> None:
    tap, port = open_tap(tap_name), open_port(port_name)
    ways = {
        port.fileno(): OneWay(lambda: port.recv(MAX_FRAME_BYTES), lambda frame: os.write(tap, frame), delay_s),
        tap: OneWay(lambda: os.read(tap, MAX_FRAME_BYTES), port.send, delay_s),
    }
    print("up", flush=True)
    while True:
        waits = [left_s for way in ways.values() if (left_s := way.deliver()) is not None]
        ready, _, _ = select.select(list(ways), [], [], min(waits, default=None))
        for descriptor in ready:
            ways[descriptor].take()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
