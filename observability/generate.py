"""Write dashboards and alert rules into the chart, and the reference of all metrics.

python -m observability.generate          writes
python -m observability.generate --check  says what is stale, and fails
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder

sys.path.insert(0, str(Path(__file__).parents[1] / ".ci"))
from generated import write_or_check

from observability.alerts import rules
from observability.dashboards.fleet import fleet
from observability.dashboards.job import job
from observability.dashboards.memory import memory
from observability.reference import reference

REPOSITORY = Path(__file__).parents[1]
CHART = REPOSITORY / "charts" / "qlora-operator"
DASHBOARDS = {"fleet": fleet, "job": job, "memory": memory}
HEAD = "# Written by 'make dashboards' from observability/alerts.py. Do not edit.\n"


def generated() -> dict[Path, str]:
    """Every file that is written here, with what it should hold."""
    files = {CHART / "dashboards" / f"{name}.json": _json(make().build()) for name, make in DASHBOARDS.items()}
    files[CHART / "files" / "alerts.yaml"] = HEAD + yaml.safe_dump(rules(), sort_keys=False, width=100)
    files[REPOSITORY / "docs" / "reference" / "metrics.md"] = reference()
    return files


def _json(dashboard: Any) -> str:
    return json.dumps(dashboard, cls=JSONEncoder, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.exit(write_or_check("Dashboards, alert rules and the reference of metrics", generated(), "dashboards"))
