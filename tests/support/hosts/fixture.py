"""The fixture through which tests get hosts."""

from collections.abc import Callable, Iterator

import pytest

from tests.support.hosts.bed import Bed
from tests.support.hosts.namespaces import namespaces, why_not

MakeBed = Callable[..., Bed]


@pytest.fixture(scope="module")
def make_bed() -> Iterator[MakeBed]:
    """``make_bed(3)``: three hosts, until the module's last test has run. Arguments are those of ``Bed``.

    Skips where no hosts can be made, and says what is missing.
    """
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    made: list[Bed] = []

    def make(num_hosts: int = 3, *, with_sink: bool = False) -> Bed:
        made.append(Bed(num_hosts, with_sink=with_sink))
        return made[-1]

    yield make
    for bed in made:
        bed.close()
    left = {host.name for bed in made for host in bed.hosts} & set(namespaces())
    assert not left, f"network namespaces were left behind: {left}"
