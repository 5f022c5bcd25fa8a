"""For all tests: ``tests/`` is importable (``services``), and the real servers are fixtures."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from services.fixtures import s3, s3_server  # noqa: F401 fixtures
