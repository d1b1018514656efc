"""Which interface carries an address."""

import pytest

from cluster.control.interfaces import local_interface_for
from cluster.replica.fabric import local_addresses
from engine.errors import LayoutError


def test_loopback_is_lo() -> None:
    assert local_interface_for("127.0.0.1") == "lo"
    assert local_addresses()["127.0.0.1"] == "lo"


def test_an_address_of_nobody_here_is_refused_with_what_there_is() -> None:
    with pytest.raises(LayoutError, match=r"carries 203\.0\.113\.1; there are: .*lo 127\.0\.0\.1"):
        local_interface_for("203.0.113.1")
