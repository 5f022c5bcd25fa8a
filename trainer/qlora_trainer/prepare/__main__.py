"""``python -m qlora_trainer.prepare CONFIG.json``"""

from __future__ import annotations

import sys

from qlora_trainer.prepare.child import run_in_child
from qlora_trainer.prepare.command import main

if __name__ == "__main__":
    sys.exit(main(run_in_child))
