"""Measure a base's layers: ``python -m qlora_trainer.inspection --model SOURCE``

Prints a line of JSON for each layer as soon as it is measured; before them one with their number.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from qlora_trainer.errors import TrainerError, system_errors
from qlora_trainer.inspection.loading import measure_base
from qlora_trainer.model.base_model import meta_model
from qlora_trainer.model.experts.structure import expert_parameters
from qlora_trainer.model.experts.targets import linear_layers
from qlora_trainer.reporting.rank_exit import quiet_libraries
from qlora_trainer.storage.fetch import default_cache, fetch_model


def say(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)  # noqa: T201 the results are the output


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m qlora_trainer.inspection", description=__doc__)
    parser.add_argument("--model", required=True, help="source of the base model, as in spec.model.source")
    parser.add_argument("--cache-dir", type=Path, default=default_cache(), help="for a base that must be fetched")
    arguments = parser.parse_args()
    quiet_libraries()
    try:
        with system_errors():
            path = fetch_model(arguments.model, arguments.cache_dir, field="MODEL").path
            skeleton = meta_model(path)
            say({"layers": len(linear_layers(skeleton)) + len(expert_parameters(skeleton))})
            measure_base(path, torch.device("cuda" if torch.cuda.is_available() else "cpu"), say)
    except TrainerError as error:
        print(error, file=sys.stderr)  # noqa: T201 one paragraph for a person
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
