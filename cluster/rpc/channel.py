"""gRPC's own settings, the same for every server and channel of ours."""

import grpc

Options = list[tuple[str, int | str]]

MAX_MESSAGE_BYTES = 64 << 20
"""A prompt of ten million tokens is about 30 MB of packed varints."""
_KEEPALIVE_TIME_MS = 10_000
_KEEPALIVE_TIMEOUT_MS = 5_000

_BOTH_ENDS: Options = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", _KEEPALIVE_TIME_MS),
    ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
    # Without it gRPC's core waits a minute for the answer to a keepalive ping, whatever the line above says.
    ("grpc.http2.ping_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    # By default pings become rare on a connection without data: then nobody would look.
    ("grpc.http2.max_pings_without_data", 0),
]

SERVER_OPTIONS: Options = [
    *_BOTH_ENDS,
    ("grpc.http2.min_recv_ping_interval_without_data_ms", _KEEPALIVE_TIME_MS // 2),
    ("grpc.so_reuseport", 0),
]
"""A silent peer is noticed within 15 s; a port that is taken is an error, never shared."""

CLIENT_FACING_OPTIONS: Options = [
    *SERVER_OPTIONS,
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_concurrent_streams", 1_000),
    # Room for a token of an issuer that writes long ones; more ends the call before anybody sees it.
    ("grpc.max_metadata_size", 32 << 10),
    ("grpc.absolute_max_metadata_size", 32 << 10),
]
"""For a server that strangers can reach: what one connection may hold is bounded before anybody has proved anything."""

CLIENT_OPTIONS: Options = [
    *_BOTH_ENDS,
    # A proxy named in the environment is not for traffic between our own processes.
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Despite its name, how long an attempt to connect may take, handshakes included: less, and a busy host looks dead.
    ("grpc.min_reconnect_backoff_ms", _KEEPALIVE_TIMEOUT_MS),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]
"""Each channel has a connection of its own, goes straight to its address, and notices silence within 15 s."""


def open_channel(
    address: str, credentials: grpc.ChannelCredentials | None = None, name: str | None = None
) -> grpc.aio.Channel:
    """A channel to host:port; without credentials in plain text, for addresses of this machine. ``name``: what must
    stand in the server's certificate instead of the host."""
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=CLIENT_OPTIONS)
    options = CLIENT_OPTIONS if name is None else [*CLIENT_OPTIONS, ("grpc.ssl_target_name_override", name)]
    return grpc.aio.secure_channel(address, credentials, options=options)
