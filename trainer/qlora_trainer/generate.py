"""Try a base, an adapter and a merged model side by side.

``python -m qlora_trainer.generate --base SOURCE --adapter DIR [--merged DIR] --prompt TEXT… --json``
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from qlora_api.spec import DatasetSpec
from qlora_storage.object_store import open_store, sha256_bytes
from qlora_trainer.data.formats import Encoder
from qlora_trainer.errors import TrainerError, system_errors
from qlora_trainer.model.base_model import causal_config
from qlora_trainer.model.device.hardware import fast_dtype
from qlora_trainer.model.loading.read_weights import load_weights
from qlora_trainer.model.tokenizer import load_tokenizer
from qlora_trainer.publish.merge_adapter import load_adapter
from qlora_trainer.reporting.rank_exit import quiet_libraries
from qlora_trainer.storage.fetch import default_cache, fetch_model


def complete(
    model: Any, tokenizer: Any, prompt: list[int], max_new_tokens: int, *, sample: bool, end: tuple[int, ...] = ()
) -> str:
    """Return the model's continuation of the prompt's tokens up to ``end``, special tokens left out."""
    ids = torch.tensor([prompt], device=model.device)
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=sample,
            stopping_criteria=StoppingCriteriaList([_EndsWith(end)] if end else []),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    answer = out[0, ids.shape[1] :].tolist()
    if end and tuple(answer[-len(end) :]) == end:
        del answer[-len(end) :]
    text: str = tokenizer.decode(answer, skip_special_tokens=True)
    return text


class _EndsWith(StoppingCriteria):  # type: ignore[misc]
    """Stop at the tokens that answers were taught to end with, which need not be the model's own end token."""

    def __init__(self, end: tuple[int, ...]) -> None:
        self._end = end

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:  # noqa: ARG002
        end = torch.tensor(self._end, device=input_ids.device)
        stops: Any = (input_ids[:, -len(self._end) :] == end).all(dim=1)
        return stops  # type: ignore[no-any-return]


def load(path: Path) -> Any:
    """Load a model for inference: onto a GPU where there is one, in the type that is fast there.

    A model that bitsandbytes has quantized on disk stays as it is; one with towers is loaded without them.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return load_weights(path, causal_config(path), fast_dtype(device), device).eval()


def local_folder(uri: str, option: str, cache_dir: Path) -> Path:
    """Return a folder on this machine with what ``uri`` holds; object storage is fetched into the cache, once."""
    if "://" not in uri:
        return Path(uri)
    folder = cache_dir / "adapters" / sha256_bytes(uri.encode())[:16]
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        open_store(uri, option).download("", partial)
        partial.rename(folder)
    return folder


def answers(arguments: argparse.Namespace) -> list[dict[str, str]]:
    """For every prompt what base, adapter and merged model say, as far as they were named."""
    base_path = fetch_model(arguments.base, arguments.cache_dir, arguments.revision).path
    tokenizer = load_tokenizer(base_path, arguments.dataset.chat_template if arguments.dataset else None)
    torch.manual_seed(0)

    dataset, conversations = arguments.dataset, arguments.conversations
    encoder = Encoder(tokenizer, dataset, conversations=conversations) if dataset else None
    encode = encoder.prompt if encoder else tokenizer.encode
    prompts, end = [encode(prompt) for prompt in arguments.prompt], encoder.end if encoder else ()

    def ask(model: Any) -> list[str]:
        sample, tokens = arguments.sample, arguments.max_new_tokens
        return [complete(model, tokenizer, prompt, tokens, sample=sample, end=end) for prompt in prompts]

    columns: dict[str, list[str]] = {"prompt": arguments.prompt}
    base = load(base_path)
    columns["base"] = ask(base)
    if arguments.adapter is not None:
        adapter = local_folder(arguments.adapter, "--adapter", arguments.cache_dir)
        columns["adapter"] = ask(load_adapter(base, adapter).eval())
    if arguments.merged is not None:
        columns["merged"] = ask(load(fetch_model(arguments.merged, arguments.cache_dir, field="--merged").path))
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m qlora_trainer.generate", description=__doc__)
    parser.add_argument("--base", required=True, help="source of the base model, as in spec.model.source")
    parser.add_argument("--revision", help="of the base; default: whatever is there")
    parser.add_argument("--cache-dir", type=Path, default=default_cache(), help="for a base that must be fetched")
    parser.add_argument("--adapter", help="folder of an adapter in PEFT's layout, here or in object storage")
    parser.add_argument("--merged", help="folder of a merged model, here or in object storage")
    parser.add_argument("--prompt", action="append", required=True, help="may be given several times")
    parser.add_argument(
        "--dataset",
        type=DatasetSpec.model_validate_json,
        help="spec.dataset of the job as JSON: prompts are put as in training, else as they are",
    )
    parser.add_argument("--conversations", action="store_true", help="the dataset's prompts are lists of messages")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--sample", action="store_true", help="sample instead of taking the likeliest token")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of text")
    arguments = parser.parse_args()
    show: Callable[[dict[str, str]], str] = json.dumps if arguments.json else _as_text
    quiet_libraries()
    try:
        with system_errors():
            rows = answers(arguments)
    except TrainerError as error:
        print(error, file=sys.stderr)  # noqa: T201 one paragraph for a person
        return error.exit_code
    for row in rows:
        print(show(row))  # noqa: T201 the answers are the output
    return 0


def _as_text(row: dict[str, str]) -> str:
    return "\n".join(f"{name}: {text}" for name, text in row.items()) + "\n"


if __name__ == "__main__":
    sys.exit(main())
