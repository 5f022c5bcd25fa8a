"""'qlora run' with a fake trainer, as a process that can be sent signals: call_run.py PLAN.json MANIFEST [--fresh]"""

import sys
from pathlib import Path

from qlora_cli.local.machine import Machine
from qlora_cli.local.run import RunRequest, run
from qlora_cli.local.trainer_process import Commands
from qlora_cli.text.output import console

FAKE = Path(__file__).with_name("fake_trainer.py")


def commands(plan):
    return Commands(*((sys.executable, str(FAKE), what, str(plan)) for what in ("prepare", "train", "generate")))


if __name__ == "__main__":
    request = RunRequest(Path(sys.argv[2]), fresh="--fresh" in sys.argv)
    sys.exit(run(request, console(), commands(sys.argv[1]), Machine()))
