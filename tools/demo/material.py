"""A base and rows that two CPU ranks train in seconds: the quickstart's real rows, and a toy base of its kind."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples" / "quickstart"
TRAIN_ROWS, EVAL_ROWS = 400, 40
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}


def make_material(folder: Path) -> None:
    """Write ``base/``, ``train.jsonl`` and ``eval.jsonl`` into a folder."""
    sys.path.insert(0, str(EXAMPLES))
    import small_base
    import stdlib_rows
    import torch
    from prepare import write_rows

    from qlora_trainer.model.device.hardware import fast_dtype

    modules = stdlib_rows.read_modules()
    rows = stdlib_rows.extract(modules)
    write_rows(folder / "train.jsonl", rows.train[:TRAIN_ROWS])
    write_rows(folder / "eval.jsonl", rows.eval[:EVAL_ROWS])
    recipe = small_base.Recipe(vocabulary=1024, hidden=64, intermediate=192, layers=2, heads=2, steps=10, batch=4)
    texts = stdlib_rows.pretraining_texts(modules)[:60]
    tokenizer = small_base.train_tokenizer(texts, recipe.vocabulary)
    model = small_base.make_model(tokenizer, recipe)
    blocks = small_base.token_blocks(tokenizer, texts, recipe)
    small_base.train_base(model, blocks, recipe, fast_dtype(torch.device("cpu")), lambda _: None)
    model.to(torch.bfloat16).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")


def make_large_base(folder: Path, small: Path) -> None:
    """Write all of a Llama of 70 billion weights but the weights: one file that is a hole behind its header.

    Args:
        folder: to be made.
        small: a base whose tokenizer it gets.

    """
    from qlora_memory import model_shape

    shutil.copytree(small, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    (folder / "config.json").write_text(json.dumps(LLAMA_70B))
    tensors, end = {}, 0
    shapes = {linear.name: [linear.outputs, linear.inputs] for linear in model_shape(LLAMA_70B).linears}
    table = [LLAMA_70B["vocab_size"], LLAMA_70B["hidden_size"]]
    shapes |= {"model.embed_tokens": table, "lm_head": table}
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        tensors[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(tensors).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
