"""One host of a group: the hosts that hold one replica together. Each brings its Ray node along; one is Ray's head.

What Kubernetes' LeaderWorkerSet starts is such a group (a pod is a host), and so are the units of deploy/systemd. No
Ray is imported here: the process that watches a replica outlives Ray's control plane.
"""

import hashlib
import hmac
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.config import Device
from cluster.control.ray_node import RayNode, write_private
from cluster.control.ray_settings import NodeSpec, authentication_environment


@dataclass(frozen=True)
class GroupHost:
    """``node_ip``: this host, as the others reach it. ``device``: cpu or cuda. ``devices``: ranks that it may hold, one
    for each GPU or CPU thread. ``secret``: the group's. ``ray_token_file``: holds Ray's token, where others
    than the group's hosts must know it (KubeRay's do); None: it is made from the secret. ``topology``: where it stands,
    from the widest to the narrowest.
    """

    node_ip: str
    device: str
    devices: int
    secret: str
    ray_token_file: Path | None = None
    topology: tuple[str, ...] = ()

    def spec(self, head_address: str | None, port: int = 0) -> NodeSpec:
        on_gpus = self.device == Device.CUDA
        return NodeSpec(
            node_ip=self.node_ip,
            cpu_slots=0 if on_gpus else self.devices,
            head_address=head_address,
            port=port,
            num_gpus=self.devices if on_gpus else 0,
            several_hosts=True,
            topology=self.topology,
        )


def ray_token(secret: str) -> str:
    """Ray's own authentication token, from the group's one secret."""
    return hmac.new(secret.encode(), b"remuda ray token", hashlib.sha256).hexdigest()


@contextmanager
def group_token(host: GroupHost) -> Iterator[Path]:
    """A file with the token, and this process's environment (its children's, that is) such that Ray uses it."""
    if host.ray_token_file is not None:
        os.environ.update(authentication_environment(host.ray_token_file))
        yield host.ray_token_file
        return
    with tempfile.TemporaryDirectory(prefix="remuda-token-") as directory:
        file = Path(directory) / "token"
        write_private(file, ray_token(host.secret))
        os.environ.update(authentication_environment(file))
        yield file


@contextmanager
def head(host: GroupHost, port: int) -> Iterator[str]:
    """Ray's head on this host, for the time of the context. Gives its address. Raises StartFailed."""
    with group_token(host) as token, RayNode.start(host.spec(None, port), token_file=token) as node:
        yield node.address
