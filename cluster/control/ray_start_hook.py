"""What ``ray start`` offers no option for. Ray calls ``adjust`` (``RAY_START_HOOK``) before it starts a node."""

import os
from typing import Protocol

from cluster.control.ray_settings import NODE_IP_VARIABLE, USER_HOME_VARIABLE


class RayParams(Protocol):
    """The fields of ``ray._private.parameter.RayParams`` that we set."""

    node_ip_address: str
    ray_client_server_port: int | None
    env_vars: dict[str, str] | None


def adjust(params: RayParams, is_head: bool) -> None:
    """Keep the node's address, give its workers the user's HOME back, and start no Ray Client server.

    * ``ray start`` replaces 127.0.0.1 by an address that the whole network can reach, and listens there.
    * Only ``ray start`` itself and the process that would ask a cloud for its name keep the private HOME; the raylet
      and with it every worker get the user's.
    """
    params.node_ip_address = os.environ[NODE_IP_VARIABLE]
    params.env_vars = {**(params.env_vars or {}), "HOME": os.environ[USER_HOME_VARIABLE]}
    params.ray_client_server_port = None
