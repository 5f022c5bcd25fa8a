"""Remove what a harness that was killed could not. The kernel has ended its processes; interfaces and groups stay."""

from __future__ import annotations

import re
from pathlib import Path

from cluster.addresses import try_claim
from cluster.network import Bridge
from cluster.node import cgroups


def remove_leftovers() -> None:
    """Remove the bridges and control groups of clusters whose number nobody holds any more."""
    groups = cgroups.names("qlora")
    bridges = [path.name for path in Path("/sys/class/net").glob("qlora*")]
    found = {int(match[1]) for name in (*groups, *bridges) if (match := re.match(r"qlora(\d+)(-|$)", name))}
    for number in found:
        addresses = try_claim(number)
        if addresses is None:
            continue
        Bridge(addresses).stop()
        for name in groups:
            if name.startswith(f"{addresses.bridge}-"):
                cgroups.remove(name)
        addresses.release()
