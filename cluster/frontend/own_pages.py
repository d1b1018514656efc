"""A server that only this machine reaches and that asks nobody who they are is still reached by every web page that its
user opens: the browser is on this machine. So what a page of elsewhere makes a browser send is told by the two headers
that no page can choose.

* ``Host`` is the name that the browser asked for. A page of elsewhere whose name suddenly means 127.0.0.1 (DNS
  rebinding) has its own name there, and could else read every answer.
* ``Origin`` says whose page asks. A page of elsewhere can post without reading the answer.
"""

import re
from collections.abc import Iterable

from cluster.config import is_loopback
from cluster.errors import PermissionDenied

_AUTHORITY = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::[0-9]{1,5})?")
_SHOWN_CHARS = 100


def check_own_page(headers: Iterable[tuple[str, str]]) -> None:
    """``headers``: all of a request, names in lower case. Programs send no Origin, and may leave Host out.

    Raises:
        PermissionDenied: a name or a page that is not of this machine.
    """
    for name, value in headers:
        if name == "host" and not _is_own(value):
            raise PermissionDenied(
                f"the server is open to this machine alone, and {value[:_SHOWN_CHARS]!r} is another name; ask for "
                "127.0.0.1 or localhost, or give the server API keys"
            )
        if name == "origin" and not _is_own_origin(value):
            raise PermissionDenied(
                f"the server is open to this machine alone, not to pages of {value[:_SHOWN_CHARS]!r}; ask from a page "
                "of 127.0.0.1 or localhost, or give the server API keys"
            )


def _is_own_origin(origin: str) -> bool:
    """``null`` is anybody's: a page can put itself into a frame that has no origin."""
    scheme, separator, authority = origin.partition("://")
    return bool(separator) and scheme in ("http", "https") and _is_own(authority)


def _is_own(authority: str) -> bool:
    """Whether host[:port] means this machine in every browser, whatever a name server says."""
    found = _AUTHORITY.fullmatch(authority.lower())
    if found is None:
        return False
    name = found[1] or found[2]
    return is_loopback(name) or name.endswith(".localhost")
