"""What leaders are told of a request that its client may come back for."""

from cluster.frontend.run import keeps_of


def test_each_sequence_says_what_was_asked_unless_that_is_huge() -> None:
    assert [keep.client_request for keep in keeps_of(b"asked", 3)] == [b"asked"] * 3
    huge = b"x" * (1 << 19)
    assert [keep.client_request for keep in keeps_of(huge, 3)] == [huge, b"", b""]
    assert [keep.client_request for keep in keeps_of(huge, 2)] == [huge, huge]
