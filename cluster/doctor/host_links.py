"""How far hosts are from each other, for placement: measured between every two of them before a gang is put on several.

Small differences are noise, and must not decide where a gang runs; so what is measured counts in powers of four.
"""

import math
from collections.abc import Sequence

from cluster.control.host_calls import HostCalls
from cluster.control.placement import HostInfo, Links
from cluster.doctor.facts import LinkFacts

_MESSAGE_BYTES = 256 * 1024
"""Of what one host sends another in a step: hidden states of a few dozen tokens."""
_RESEND_S = 0.2
"""A lost segment at the end of a message is sent again after so long at the earliest (TCP_RTO_MIN of Linux)."""
_NEAR_S = 0.5e-3
"""What takes no longer is near: 10 Gbit/s inside a data centre."""
_STEP = 4.0


def measure_host_links(calls: HostCalls, hosts: Sequence[HostInfo]) -> Links:
    """One TCP connection between every two hosts; pairs that do not reach each other are left out."""
    # It needs torch, which takes seconds: the control process imports that while Ray starts.
    from cluster.doctor.ask_ranks import ask_ranks

    _, found = ask_ranks(calls, [hosts], on_gpus=False, tcp_only=True)
    links = {}
    for link in found:
        if (seconds := message_seconds(link)) is not None:
            one, other = hosts[link.first].node_id, hosts[link.second].node_id
            links[one, other] = links[other, one] = rounded(seconds)
    return links


def message_seconds(link: LinkFacts) -> float | None:
    """How long a message takes one way, losses included. None: the hosts do not reach each other."""
    if link.error is not None or link.channel_s is None or not link.channel_bytes_per_s:
        return None
    return link.channel_s / 2 + _MESSAGE_BYTES / link.channel_bytes_per_s + (link.lost_share or 0.0) * _RESEND_S


def rounded(seconds: float) -> float:
    """Down to _NEAR_S times a power of four; _NEAR_S at least."""
    return float(_NEAR_S * _STEP ** math.floor(math.log(max(1.0, seconds / _NEAR_S), _STEP)))
