"""What the probes of a further host say."""

from cluster.control.group_member import STUCK_S, Membership


def test_a_member_that_no_longer_looks_hangs() -> None:
    now_s = 100.0
    membership = Membership(lambda: now_s)
    now_s += 10 * STUCK_S
    assert membership.live() == (True, {}) and not membership.ready()[0], "it may wait for its head for ever"
    membership.looked()
    now_s += STUCK_S
    assert membership.live() == (True, {}) and membership.ready()[0]
    now_s += 1
    assert membership.live() == (False, {"group": f"not looked after for {STUCK_S + 1:.0f} s"})
    membership.looked()
    assert membership.live()[0]
    membership.ended()
    assert not membership.ready()[0]
