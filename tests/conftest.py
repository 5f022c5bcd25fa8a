"""For all tests: ``tests/`` and ``tools/`` are importable, and the real servers are fixtures."""

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
sys.path.insert(0, str(Path(__file__).parent))

from fixtures import place, s3, s3_server, tmpfs  # noqa: F401 fixtures

# A shell starts a job in the background with SIGINT and SIGQUIT ignored, and nohup ignores SIGHUP. Children would
# inherit that, and the tests of Ctrl-C would wait for an end that never comes.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
