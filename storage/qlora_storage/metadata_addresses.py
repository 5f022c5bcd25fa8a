"""Addresses at which clouds serve credentials of nodes and pods: no server that a job names may be there.

A server is asked for objects, and its answers become rows. So a Secret's endpoint could otherwise read what only the
machine may have. The chart's ``networkPolicy.trainers`` leaves out the same addresses.
"""

from __future__ import annotations

import socket
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from qlora_api.environment import WORKLOAD_IDENTITY
from qlora_storage.store_settings import is_on

if TYPE_CHECKING:
    from collections.abc import Mapping

REFUSED = (
    "leads to a link-local address or to one at which clouds serve credentials of machines; such a server can be used "
    "only where the operator says so (chart value trainer.workloadIdentity)"
)
_NETWORKS = tuple(
    ip_network(network)
    for network in (
        "169.254.0.0/16",
        "fe80::/10",
        "fd00:ec2::/32",  # AWS
        "fd20:ce::254",  # Google Cloud
        "168.63.129.16",  # Azure
        "fd00:c1::a9fe:a9fe",  # Oracle Cloud
        "192.0.0.192",
        "100.100.100.200",  # Alibaba Cloud
        "fd00:100::100:200",
        "fd00:42::42",  # Scaleway
        "fd00:a9fe:a9fe::1",  # Akamai
    )
)
_NAT64 = ip_network("64:ff9b::/96")


def leads_to_metadata(url: str, environ: Mapping[str, str]) -> bool:
    """Tell whether a URL's host is, or resolves to, an address that is refused; never with a workload identity.

    A name that does not resolve is not refused: the client says so.
    """
    if is_on(environ, WORKLOAD_IDENTITY):
        return False
    try:
        found = socket.getaddrinfo(urlsplit(url).hostname, None, type=socket.SOCK_STREAM)
    except (OSError, ValueError):
        return False
    return any(_is_refused(str(address[0])) for *_, address in found)


def _is_refused(text: str) -> bool:
    address = ip_address(text.partition("%")[0])
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped:
            address = address.ipv4_mapped
        elif address in _NAT64:
            address = IPv4Address(int(address) & 0xFFFFFFFF)
    return any(address in network for network in _NETWORKS)
