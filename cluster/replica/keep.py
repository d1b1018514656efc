"""What a leader is told of a request that its client may come back for."""

from dataclasses import dataclass


@dataclass
class Keep:
    """One sequence of a resumable request.

    ``client_request`` is what the front end wants whoever goes on with the request to know; opaque to the leader, and
    empty where others of its sequences say it. ``is_wanted``: false once nothing more is wanted of the sequence, so
    that its work may end when its reader leaves; what it gave is still kept for a grace time.
    """

    client_request: bytes = b""
    is_wanted: bool = True
