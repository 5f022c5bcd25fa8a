"""An upgrade of the chart changes its definition, and an uninstall keeps it with its jobs."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from charts.helm import CHART
from charts.installed import CRD, MEMORY, InstalledChart, running
from cluster.scenarios.jobs import qlora_job, wait_until_served

if TYPE_CHECKING:
    from pathlib import Path


def test_an_upgrade_changes_the_definition_and_an_uninstall_keeps_it(helm, tmp_path):
    with running(tmp_path / "cluster") as cluster:
        release = InstalledChart(helm, cluster)
        release.upgrade()
        wait_until_served(cluster.api)
        cluster.api.create(qlora_job("kept"))
        cluster.api.patch(MEMORY, {"data": {"corrections": "{}"}})

        release.upgrade(newer_chart(tmp_path))
        assert cluster.api.get(CRD)["spec"]["names"]["shortNames"] == ["qlj", "qlnew"]
        assert cluster.api.get(MEMORY)["data"] == {"corrections": "{}"}, "what the operator learned outlives an upgrade"

        objects = release.objects()
        release.uninstall()
        definitions = [("CustomResourceDefinition", f"{plural}.qlora.dev") for plural in ("qlorajobs", "qlorasweeps")]
        assert sorted(release.left(objects)) == definitions
        assert cluster.api.get("/apis/qlora.dev/v1alpha1/namespaces/default/qlorajobs/kept")

        release.upgrade(crds={"keep": False})  # installed again, over the definition that was kept
        objects = release.objects()
        release.uninstall()
        cluster.api.wait_gone(CRD)
        assert release.left(objects) == []


def newer_chart(folder) -> Path:
    """The chart with a definition that has one short name more."""
    chart = folder / "qlora-operator"
    shutil.copytree(CHART, chart)
    definition = chart / "files" / "crd.yaml"
    text = definition.read_text()
    definition.write_text(text.replace("shortNames:\n    - qlj", "shortNames:\n    - qlj\n    - qlnew"))
    return chart
