"""Merge an adapter into its base: ``python -m qlora_trainer.merge --base SOURCE --adapter DIR --out DIR``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qlora_trainer.errors import TrainerError, system_errors
from qlora_trainer.model.tokenizer import load_tokenizer
from qlora_trainer.publish.gate import verify_merged
from qlora_trainer.publish.merge_adapter import merge
from qlora_trainer.reporting.rank_exit import quiet_libraries
from qlora_trainer.storage.fetch import default_cache, fetch_model


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m qlora_trainer.merge", description=__doc__)
    parser.add_argument("--base", required=True, help="source of the base model, as in spec.model.source")
    parser.add_argument("--revision", help="of the base; default: whatever is there")
    parser.add_argument("--adapter", type=Path, required=True, help="folder of an adapter in PEFT's layout")
    parser.add_argument("--out", type=Path, required=True, help="empty folder for the merged model")
    parser.add_argument("--cache-dir", type=Path, default=default_cache(), help="for a base that must be fetched")
    arguments = parser.parse_args()
    quiet_libraries()
    try:
        with system_errors():
            base = fetch_model(arguments.base, arguments.cache_dir, arguments.revision).path
            merge(base, arguments.adapter, arguments.out)
            load_tokenizer(arguments.adapter).save_pretrained(arguments.out)
            verify_merged(arguments.out)
    except TrainerError as error:
        print(error, file=sys.stderr)  # noqa: T201 one paragraph for a person
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
