"""Which requests a leader has, and whose they are."""

from cluster.replica.held_streams import HeldStreams
from cluster.replica.stream_history import StreamHistory


def test_who_has_anything_is_not_empty() -> None:
    held = HeldStreams()
    assert held.is_empty
    held.add(StreamHistory("c1.0"))
    assert not held.is_empty, "one that runs"


def test_the_sequences_of_one_call_are_not_those_of_one_with_a_longer_name() -> None:
    held = HeldStreams()
    for name in ("c1.0", "c1.1~2", "c10.0", "c2.0"):
        held.add(StreamHistory(name))
    assert [stream.request_id for stream in held.of_call("c1")] == ["c1.0", "c1.1~2"]
    assert [stream.request_id for stream in held.of_call("c10")] == ["c10.0"]
    assert held.of_call("c") == []
