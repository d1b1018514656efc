"""Hosts to try things on by hand: ``python -m tests.support.hosts.by_hand 4`` (``make hosts N=4``).

Says how to enter each; takes a line for each fault; Ctrl-C, SIGTERM, SIGHUP or the end of input removes everything.
"""

import contextlib
import signal
import sys

from tests.support.hosts.bed import Bed
from tests.support.hosts.namespaces import why_not

HELP = """\
Faults, one a line (hosts by number):
  delay 2 5       every frame from and to host 2 takes 5 ms each way (0: none)
  limit 2 100     host 2 sends and gets at most 100 Mbit/s (0: no limit)
  lose 2 1        1 % of the frames between host 2 and all others are lost
  drop 1 2        nothing of host 1 reaches host 2
  partition 1,2 3 two sides that do not reach each other
  cut 2, heal 2   pull host 2's cable, plug it in again
  reunite         no loss, drop or partition any more
Ctrl-C removes the hosts and ends whatever runs in them."""
_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def obey(bed: Bed, line: str) -> None:
    """Raises ValueError and IndexError for what is no order."""
    word, *arguments = line.split()
    network = bed.network

    def host(text: str) -> int:
        number = int(text)
        if not 1 <= number <= len(bed.hosts):
            raise ValueError(f"there is no host {number}")
        return number - 1

    if word == "partition":
        network.partition(*([bed.hosts[host(number)] for number in side.split(",")] for side in arguments))
    elif word == "reunite":
        network.reunite()
    elif word == "drop":
        network.drop(bed.hosts[host(arguments[0])], bed.hosts[host(arguments[1])])
    elif word in ("cut", "heal"):
        getattr(network, word)(bed.hosts[host(arguments[0])])
    elif word == "delay":
        network.delay(bed.hosts[host(arguments[0])], float(arguments[1]))
    elif word == "limit":
        network.limit(bed.hosts[host(arguments[0])], float(arguments[1]) or None)
    elif word == "lose":
        chosen = bed.hosts[host(arguments[0])]
        network.lose(chosen, float(arguments[1]) / 100, [other for other in bed.hosts if other is not chosen])
    else:
        raise ValueError(f"{word} is no order")


def main(num_hosts: int) -> int:
    if (reason := why_not()) is not None:
        print(f"no hosts can be made: {reason}", file=sys.stderr)
        return 1
    # Background jobs of a shell are started with Ctrl-C ignored, and so would be what they start.
    for number in _ENDS:
        signal.signal(number, signal.default_int_handler)
    with Bed(num_hosts) as bed:
        try:
            for host in bed.hosts:
                print(f"host {host.number}  {host.address}  enter: ip netns exec {host.name} bash")
            print(HELP, flush=True)
            for line in filter(str.strip, sys.stdin):
                try:
                    obey(bed, line)
                    print("done", flush=True)
                except (ValueError, IndexError, RuntimeError) as error:
                    print(f"not done: {error}", flush=True)
        except KeyboardInterrupt:
            with contextlib.suppress(OSError):  # the terminal may be gone
                print(flush=True)
        finally:
            for number in _ENDS:  # once more would leave hosts behind
                signal.signal(number, signal.SIG_IGN)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 3))
