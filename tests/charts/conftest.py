"""helm, on this repository's chart."""

from __future__ import annotations

import pytest

from charts.helm import Helm
from fixtures import skip_unless_ci
from services.binaries import ToolMissingError, find_or_build
from services.tools import HELM


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """No cluster: for what is rendered."""
    try:
        return Helm(find_or_build(HELM), tmp_path_factory.mktemp("helm"))
    except ToolMissingError as error:
        skip_unless_ci(str(error))
        raise
