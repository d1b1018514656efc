"""What ``ray start`` offers no option for. Ray calls ``adjust`` (``RAY_START_HOOK``) before it starts a node."""

import os
from typing import Protocol

from cluster.control.ray_settings import USER_HOME_VARIABLE


class RayParams(Protocol):
    """The two fields of ``ray._private.parameter.RayParams`` that we set."""

    ray_client_server_port: int | None
    env_vars: dict[str, str] | None


def adjust(params: RayParams, is_head: bool) -> None:
    """Give the raylet, and with it every worker, the user's HOME back, and start no Ray Client server.

    Only ``ray start`` itself and the process that would ask a cloud for its name keep the private HOME.
    """
    params.env_vars = {**(params.env_vars or {}), "HOME": os.environ[USER_HOME_VARIABLE]}
    params.ray_client_server_port = None
