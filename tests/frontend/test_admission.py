"""Who gets in while there is room, and who has to leave some of it."""

from contextlib import ExitStack

import pytest

from cluster.errors import Draining
from cluster.frontend.admission import OTHERS_PART, Admission
from engine.errors import InvalidRequest, Overloaded

ROOM = 4 * OTHERS_PART


def test_no_named_tenant_takes_the_last_sixteenth() -> None:
    admission = Admission(ROOM)
    with ExitStack() as stack:
        for _ in range(ROOM - 4):
            stack.enter_context(admission.admitted(1, "a"))
        with pytest.raises(Overloaded, match="'a' may have 60 live sequences"):
            stack.enter_context(admission.admitted(1, "a"))
        for tenant in ("b", "c", "default", "default"):
            stack.enter_context(admission.admitted(1, tenant))
        with pytest.raises(Overloaded, match="64 sequences are live"):
            stack.enter_context(admission.admitted(1, "d"))
    assert admission.num_requests == 0
    with ExitStack() as stack:
        for _ in range(ROOM - 4):
            stack.enter_context(admission.admitted(1, "a"))  # all of them were given back


def test_the_tenant_without_a_name_may_take_all() -> None:
    admission = Admission(ROOM)
    with ExitStack() as stack:
        for _ in range(ROOM):
            stack.enter_context(admission.admitted(1))
        with pytest.raises(Overloaded):
            stack.enter_context(admission.admitted(1))


def test_one_request_may_have_an_idle_server_to_itself() -> None:
    admission = Admission(ROOM)
    with admission.admitted(ROOM, "a"), pytest.raises(Overloaded), admission.admitted(1, "b"):
        pass
    with admission.admitted(1, "b"), pytest.raises(Overloaded), admission.admitted(ROOM - 3, "a"):
        pass
    with pytest.raises(InvalidRequest), admission.admitted(ROOM + 1, "a"):
        pass


def test_a_closed_one_takes_nobody() -> None:
    admission = Admission(ROOM)
    admission.close()
    with pytest.raises(Draining), admission.admitted(1, "a"):
        pass
