"""Remove what a harness that was killed could not. The kernel has ended its processes; interfaces and groups stay."""

from __future__ import annotations

import re
from pathlib import Path

from cluster.network import Bridge
from cluster.node import cgroups
from cluster.slots import try_claim


def remove_leftovers() -> None:
    """Remove the bridges and control groups of clusters whose number nobody holds any more."""
    groups = cgroups.names("qlora")
    bridges = [path.name for path in Path("/sys/class/net").glob("qlora*")]
    found = {int(match[1]) for name in (*groups, *bridges) if (match := re.match(r"qlora(\d+)(-|$)", name))}
    for number in found:
        slot = try_claim(number)
        if slot is None:
            continue
        Bridge(slot).stop()
        for name in groups:
            if name.startswith(f"{slot.bridge}-"):
                cgroups.remove(name)
        slot.release()
