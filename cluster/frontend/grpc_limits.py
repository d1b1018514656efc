"""What gRPC connections of strangers may cost, in number and time."""

from dataclasses import dataclass, field

from cluster.frontend.connection_share import affordable_connections
from cluster.rpc.channel import CLIENT_FACING_OPTIONS, Options


@dataclass(frozen=True)
class GrpcLimits:
    """``idle_s``: a connection without a call for so long is ended; its client connects again with its next call.
    ``max_connections``: of one server. More are closed as soon as they are there.
    """

    idle_s: float = 300.0
    max_connections: int = field(default_factory=lambda: affordable_connections(1 / 4))

    def options(self) -> Options:
        """Of a server that strangers can reach."""
        return [
            *CLIENT_FACING_OPTIONS,
            ("grpc.max_allowed_incoming_connections", self.max_connections),
            ("grpc.max_connection_idle_ms", round(self.idle_s * 1000)),
        ]
