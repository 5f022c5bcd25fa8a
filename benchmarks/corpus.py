"""Rows, tokenizer and model of the benchmarks: real text of mixed length, made from Python's own standard library."""

from __future__ import annotations

import ast
import json
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_LENGTH = 512
"""Tokens of the longest row, and of a pack."""
VOCABULARY = 8192
END = "<|end|>"
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 384,
    "intermediate_size": 1152,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
"""A Llama in small: as deep as it can be while a run takes half a minute on two cores."""


def functions() -> Iterator[dict[str, str]]:
    """Yield the documented functions of the standard library: signature and docstring as prompt, body as completion."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(p for p in library.glob("*.py") if p.is_file()):
        source = path.read_text("utf-8")
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef) or ast.get_docstring(node) is None or len(node.body) < 2:
                continue
            split = node.body[0].end_lineno or 0
            prompt = "\n".join(lines[node.lineno - 1 : split])
            yield {"prompt": prompt + "\n", "completion": "\n".join(lines[split : node.end_lineno])}


def make_tokenizer(texts: list[str]) -> Any:
    """Train a byte-level BPE on the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def prepare(folder: Path, rows: int) -> tuple[Path, Path]:
    """Write model and rows, unless they are there.

    Returns:
        Folder of the model with its tokenizer, JSONL file of the rows.

    """
    import torch  # noqa: PLC0415 the rest of this module does without
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    folder.mkdir(exist_ok=True)
    model, data = folder / "model", folder / f"rows-{rows}.jsonl"
    if data.exists():
        return model, data
    found = list(functions())
    tokenizer = make_tokenizer([r["prompt"] + r["completion"] for r in found])
    # One token is left for the end of the text.
    fitting = [r for r in found if len(tokenizer(r["prompt"] + r["completion"])["input_ids"]) < MAX_LENGTH]
    tokenizer.save_pretrained(model)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16).save_pretrained(model)
    stride = len(fitting) / rows  # spread over all modules, the same on every call
    chosen = [fitting[int(i * stride)] for i in range(rows)]
    data.write_text("".join(json.dumps(r) + "\n" for r in chosen), "utf-8")
    return model, data
