"""The trainer taking this CPU's slow float16 for hardware's, so that its arithmetic can be compared.

``python emulated_float16.py prepare CONFIG.json``, then a process for each rank:
``torchrun --nproc-per-node N emulated_float16.py rank CONFIG.json``
"""

from __future__ import annotations

import os
import sys

from qlora_trainer import rank
from qlora_trainer.model.device import compute_type
from qlora_trainer.prepare import command

if __name__ == "__main__":
    compute_type.fp16_in_hardware = lambda _: True
    part = {"prepare": command, "rank": rank}[sys.argv.pop(1)]
    code = part.main()
    sys.stdout.flush()
    os._exit(code)  # as qlora_trainer.rank does: gloo's threads must not hold up the end
