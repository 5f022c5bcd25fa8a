"""Addresses that no other cluster on this machine has, so that each cluster can use the well-known ports."""

from __future__ import annotations

import socket
from dataclasses import dataclass

CLUSTERS = 64


@dataclass(frozen=True)
class ClusterAddresses:
    """One cluster's number and what follows from it. The number is free again when this process ends."""

    number: int
    _claim: socket.socket

    @property
    def loopback(self) -> str:
        """Address of a control plane that only this machine reaches; all of 127/8 is this machine."""
        return f"127.77.{self.number}.1"

    @property
    def _prefix(self) -> str:
        return f"10.{128 + self.number}"

    @property
    def bridge(self) -> str:
        """Name of the network interface between this machine and the cluster's real nodes."""
        return f"qlora{self.number}"

    @property
    def gateway(self) -> str:
        """This machine's address on the bridge, which nodes and pods reach."""
        return f"{self._prefix}.0.1"

    @property
    def service_range(self) -> str:
        return f"{self._prefix}.128.0/17"

    @property
    def api_service(self) -> str:
        """The Service ``kubernetes`` has the first address of the range."""
        return f"{self._prefix}.128.1"

    def node_address(self, index: int) -> str:
        """Address of real node 1 … 63."""
        return f"{self._prefix}.0.{100 + index}"

    def pod_range(self, index: int) -> str:
        """Range of the pods of real node 1 … 63."""
        return f"{self._prefix}.{index}.0/24"

    @property
    def fake_pod_range(self) -> str:
        """Range of the pods that kwok pretends to run; nothing answers there."""
        return f"{self._prefix}.64.0/18"

    def release(self) -> None:
        self._claim.close()


def claim_addresses() -> ClusterAddresses:
    """Take the first free number.

    Raises:
        RuntimeError: all are taken.

    """
    for number in range(CLUSTERS):
        addresses = try_claim(number)
        if addresses is not None:
            return addresses
    raise RuntimeError(f"{CLUSTERS} test clusters run on this machine already")


def try_claim(number: int) -> ClusterAddresses | None:
    """Take this number, if it is free. A bound abstract socket is the claim: atomic, and gone with the process."""
    claim = socket.socket(socket.AF_UNIX)
    try:
        claim.bind(f"\0qlora-test-cluster-{number}")
    except OSError:
        claim.close()
        return None
    return ClusterAddresses(number, claim)
