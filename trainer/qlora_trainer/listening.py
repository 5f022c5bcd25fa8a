"""Listen on all addresses of a pod."""

from __future__ import annotations

import socket
from contextlib import suppress


def listen_everywhere(port: int, backlog: int) -> socket.socket:
    """Return a listener on all addresses, of IPv6 and IPv4, whichever there are; port 0 takes any free one."""
    if socket.has_dualstack_ipv6():
        with suppress(OSError):  # compiled in, but switched off
            return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog)
    return socket.create_server(("0.0.0.0", port), backlog=backlog)  # noqa: S104 others are to reach it
