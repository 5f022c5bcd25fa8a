"""The network between this machine, a cluster's real nodes and their pods.

One bridge of the machine joins it and the nodes, each in a network namespace of its own. Nodes and pods are on one
subnet: a node answers ARP for its pods (proxy ARP), so that nobody needs a route. Nothing leads out of the machine.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.addresses import ClusterAddresses

PREFIX_BITS = 17
"""Machine, nodes and pods; the other half of the cluster's range is for Services."""


@dataclass(frozen=True)
class Bridge:
    """This machine's end."""

    addresses: ClusterAddresses

    def start(self) -> None:
        ip("link", "add", self.addresses.bridge, "type", "bridge")
        ip("addr", "add", f"{self.addresses.gateway}/{PREFIX_BITS}", "dev", self.addresses.bridge)
        ip("link", "set", self.addresses.bridge, "up")

    def stop(self) -> None:
        ip("link", "del", self.addresses.bridge, check=False)

    def join(self, index: int, pid: int) -> None:
        """Give the network namespace of a process an interface ``eth0`` with the node's address."""
        end, address = f"{self.addresses.bridge}n{index}", f"{self.addresses.node_address(index)}/{PREFIX_BITS}"
        ip("link", "del", end, check=False)  # of the node's last boot, if the kernel has not removed it yet
        ip("link", "add", end, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        ip("link", "set", end, "master", self.addresses.bridge, "up")
        script = (
            "ip link set lo up; ip link set eth0 up",
            f"ip addr add {address} dev eth0",
            f"ip route add default via {self.addresses.gateway}",
            "cd /proc/sys/net",
            "echo 1 > ipv6/conf/all/disable_ipv6",
            "echo 1 > ipv4/ip_forward",
            "echo 1 > ipv4/conf/eth0/proxy_arp; echo 0 > ipv4/neigh/eth0/proxy_delay",
            # A Service that kube-proxy does not know yet is refused; lost packets would be sent again to nowhere.
            f"iptables -A FORWARD -d {self.addresses.service_range} -j REJECT",
        )
        subprocess.run(["nsenter", "-t", str(pid), "-m", "-n", "sh", "-ec", "\n".join(script)], check=True)

    def route_services_to(self, index: int) -> None:
        """Let this machine reach Services, as webhooks and out-of-cluster programs need, by a node's kube-proxy."""
        ip(
            "route",
            "replace",
            self.addresses.service_range,
            "via",
            self.addresses.node_address(index),
            "dev",
            self.addresses.bridge,
        )


def ip(*arguments: str, check: bool = True) -> None:
    """Run iproute2's ``ip``.

    Raises:
        RuntimeError: it fails, and ``check`` is set.

    """
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
