"""A rank of the trainer that takes this CPU's slow float16 for hardware's, so that its arithmetic can be compared.

``torchrun --nproc-per-node N emulated_float16.py CONFIG.json``, with a prepared TrainerConfig.
"""

from __future__ import annotations

import os

from qlora_trainer import compute_type, rank

if __name__ == "__main__":
    compute_type.fp16_in_hardware = lambda _: True
    os._exit(rank.main())  # as qlora_trainer.rank does: gloo's threads must not hold up the end
