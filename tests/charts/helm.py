"""helm as a process, on this repository's chart."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[2]
CHART = REPOSITORY / "charts" / "qlora-operator"
RELEASE, NAMESPACE = "qlora", "qlora-system"
SECONDS = 120

Object = dict[str, Any]


class HelmError(Exception):
    """helm ended with an error; the text is what it says."""


@dataclass(frozen=True)
class Helm:
    """One helm, and the cluster it speaks to, if any.

    Args:
        home: for what helm would keep in the user's home.

    """

    binary: Path
    home: Path
    kubeconfig: Path = Path("/nonexistent")

    def __call__(self, *arguments: str | Path, stdin: str = "") -> str:
        """Run helm; what it prints.

        Raises:
            HelmError: it fails.

        """
        places = {f"HELM_{kind}_HOME": str(self.home / kind) for kind in ("CACHE", "CONFIG", "DATA")}
        done = subprocess.run(
            [self.binary, *arguments],
            input=stdin,
            env={**os.environ, **places, "KUBECONFIG": str(self.kubeconfig), "NO_PROXY": "*"},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        if done.returncode:
            raise HelmError(done.stderr)
        return done.stdout

    def template(self, values: Object | None = None, chart: Path = CHART) -> str:
        """The manifests as text."""
        text = yaml.safe_dump(values or {})
        return self("template", RELEASE, chart, "--namespace", NAMESPACE, "--values", "-", stdin=text)

    def render(self, values: Object | None = None) -> list[Object]:
        """The manifests as objects."""
        return [document for document in yaml.safe_load_all(self.template(values)) if document]


def one(objects: list[Object], kind: str, name: str = "") -> Object:
    """The only object of a kind, or of a kind whose name has this end."""
    found = [o for o in objects if o["kind"] == kind and o["metadata"]["name"].endswith(name)]
    assert len(found) == 1, f"{len(found)} of kind {kind} {name}"
    return found[0]
