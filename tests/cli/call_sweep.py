"""'qlora sweep' with a fake trainer, as a process that can be sent signals: call_sweep.py PLAN.json MANIFEST"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from call_run import commands
from qlora_cli.local.machine import Machine
from qlora_cli.sweeps.run_sweep import SweepRequest, run_sweep
from qlora_cli.text.output import console

if __name__ == "__main__":
    sys.exit(run_sweep(SweepRequest(Path(sys.argv[2])), console(), commands(sys.argv[1]), Machine()))
