"""Ports to listen on that nobody else takes, before the listener is there and while it is away."""

from __future__ import annotations

import errno
import random
import socket

RANGE = range(20000, 29000)
"""Below what Linux gives to clients (net.ipv4.ip_local_port_range: from 32768) and Kubernetes to NodePorts (30000)."""
_claims: list[socket.socket] = []


def free_port(address: str = "127.0.0.1") -> int:
    """A port of this process's own until it ends: no client is given it, nor any other process that asks here.

    Raises:
        RuntimeError: all are taken.

    """
    for port in random.SystemRandom().sample(RANGE, len(RANGE)):
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0qlora-test-port-{port}")  # atomic, and gone with the process
            with socket.socket() as probe:
                probe.bind((address, port))
        except OSError as error:
            claim.close()
            if error.errno != errno.EADDRINUSE:
                raise
            continue
        _claims.append(claim)
        return port
    raise RuntimeError(f"no port from {RANGE.start} to {RANGE.stop - 1} is free")
