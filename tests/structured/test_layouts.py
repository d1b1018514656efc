"""Grammars where several ranks sample (one in each dp group), and where tokens come back from a later stage."""

from typing import Any

import pytest

from engine.request import Request
from tests.parity.reference import Reference
from tests.structured.engine_bed import TINY, Bed, ids_of, regex, request
from tests.support.gang_engine import gang_engine

pytestmark = pytest.mark.timeout(120)

PATTERNS = (r"[a-f]{3}-[0-9]{4}", r"(yes|no), (the )?(mare|colt) [a-z]{4,9}\.", r"\{\"n\": [1-9][0-9]{0,5}\}")


def requests() -> list[Request]:
    """More than one group has slots; some have no grammar."""
    found = [request(f"free-{seed}", None, seed=seed, max_tokens=12) for seed in range(3)]
    for i, pattern in enumerate(PATTERNS):
        found += [request(f"{i}-{seed}", regex(pattern), seed=seed) for seed in range(3)]
    return found


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({"pp": 2, "depth": 2}, id="pp2"),
        pytest.param({"pp": 2, "dp": 2, "depth": 3, "max_num_batched_tokens": 16}, id="pp2-dp2-chunked"),
    ],
)
def test_answers_are_those_of_one_rank(bed: Bed, layout: dict[str, Any]) -> None:
    asked = requests()
    expected = {name: ids_of(outputs) for name, outputs in bed.run(*asked).items()}
    values: dict[str, Any] = {"max_num_seqs": 4, "kv_cache_memory_bytes": 4 * 2**20}
    with gang_engine(Reference(TINY, [], []), **values | layout) as served:
        found = served.run(asked)
    assert all(outputs[-1].error is None for outputs in found.values())
    assert {name: ids_of(outputs) for name, outputs in found.items()} == expected
