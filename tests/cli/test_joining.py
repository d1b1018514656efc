"""A replica's next leader joins what serves already, or does not."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from rich.console import Console

from cluster.cli.serve_run import Serving
from cluster.frontend.fleet import Fleet
from cluster.replica.events import ReplicaReady
from tests.support.leader_bed import until
from tests.support.served import free_port


async def test_a_leader_that_is_given_up_is_not_tried_any_more() -> None:
    """The next one may listen at the same address."""
    launch = SimpleNamespace(secret="", replica=SimpleNamespace(cluster_tls=None))
    serving = Serving(Console(quiet=True), cast(Any, None), cast(Any, SimpleNamespace(launch=launch)), cast(Any, None))
    fleet = Fleet()
    before = asyncio.all_tasks()
    joining = asyncio.create_task(serving._welcome(ReplicaReady("r0", f"127.0.0.1:{free_port()}", 100), fleet))
    await until(lambda: len(asyncio.all_tasks() - before) > 1)
    joining.cancel()
    _, going_on = await asyncio.wait(asyncio.all_tasks() - before, timeout=5)
    assert not going_on
    await fleet.close()
