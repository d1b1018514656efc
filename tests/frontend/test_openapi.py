"""/openapi.json against the routes that exist, and against what the server does with what schemathesis makes of it."""

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from starlette.routing import Route

from cluster.frontend.console.files import PATHS as CONSOLE_PATHS
from tests.frontend.bodies import EOT
from tests.frontend.scripted import ScriptedBackend, says
from tests.frontend.servers import Served, served
from tests.frontend.threaded import serving

NUM_EXAMPLES = 12
"""Of each kind and operation; the full run has more."""
NUM_EXAMPLES_FULL = 300
# Not "positive_data_acceptance": whether a model of this name is served, a conversation fits the context or a regular
# expression is one, no schema can say.
CHECK_NAMES = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
)


async def test_every_route_is_documented_and_every_documented_operation_is_routed() -> None:
    async with served(ScriptedBackend(says([300]))) as one:
        document = (await one.http.get("/openapi.json")).json()
        documented = {(method.upper(), path) for path, operations in document["paths"].items() for method in operations}
        app = one.front_end._http._server.config.app
        routed = {
            (method, route.path.replace(":path}", "}"))
            for route in app.routes  # type: ignore[union-attr]
            if isinstance(route, Route)
            for method in (route.methods or set()) - {"HEAD"}
        }
        refused = {(method, path) for method, path in routed if path.rpartition("/")[2] in REFUSED}
        page = {("GET", path) for path in CONSOLE_PATHS}
        assert documented == routed - refused - page - {("GET", "/openapi.json")}
        assert len(refused) == 2 * len(REFUSED)


REFUSED = ("pull", "push", "create", "copy", "delete")


@pytest.fixture(scope="module")
def one() -> Iterator[Served]:
    with serving(ScriptedBackend(says([300, 301], stop_token_id=EOT))) as running:
        yield running


# 413: a body that breaks the schema may be too large to be looked at.
REFUSALS = {"checks": {"negative_data_rejection": {"expected-statuses": ["400", "404", "413"]}}}


def operations_of(one: Served) -> list[schemathesis.core.result.Result]:
    config = schemathesis.Config.from_dict(REFUSALS)
    schema = schemathesis.openapi.from_url(f"{one.url}/openapi.json", config=config)
    return [result.ok() for result in schema.get_all_operations()]


def run(one: Served, num_examples: int) -> int:
    """Every operation with good and with bad input, from a fixed seed. Returns the number of requests."""
    num_requests = 0
    load_all_checks()
    checks = CHECKS.get_by_names(list(CHECK_NAMES))
    for operation in operations_of(one):
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            # A name in a path can be any text, so there is none that the schema would not allow.
            if mode is GenerationMode.NEGATIVE and not (operation.body or operation.query):
                continue

            @seed(7)
            @settings(
                max_examples=num_examples,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode), data=st.none())
            def asks(case: schemathesis.Case, data: None) -> None:
                nonlocal num_requests
                num_requests += 1
                case.call_and_validate(base_url=one.url, checks=checks, timeout=20)

            asks()
    return num_requests


@pytest.mark.timeout(120)
def test_schemathesis(one: Served) -> None:
    assert run(one, NUM_EXAMPLES) > 300


@pytest.mark.full
@pytest.mark.timeout(900)
def test_schemathesis_at_length(one: Served) -> None:
    assert run(one, NUM_EXAMPLES_FULL) > 5000
