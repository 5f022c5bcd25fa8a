"""A base and rows that two CPU ranks train in seconds: the quickstart's real rows, and a toy base of its kind."""

from __future__ import annotations

import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples" / "quickstart"
TRAIN_ROWS, EVAL_ROWS = 400, 40


def make_material(folder: Path) -> None:
    """Write ``base/``, ``train.jsonl`` and ``eval.jsonl`` into a folder."""
    sys.path.insert(0, str(EXAMPLES))
    import small_base
    import stdlib_rows
    import torch
    from prepare import write_rows

    modules = stdlib_rows.read_modules()
    rows = stdlib_rows.extract(modules)
    write_rows(folder / "train.jsonl", rows.train[:TRAIN_ROWS])
    write_rows(folder / "eval.jsonl", rows.eval[:EVAL_ROWS])
    recipe = small_base.Recipe(vocabulary=1024, hidden=64, intermediate=192, layers=2, heads=2, steps=10, batch=4)
    texts = stdlib_rows.pretraining_texts(modules)[:60]
    tokenizer = small_base.train_tokenizer(texts, recipe.vocabulary)
    model = small_base.make_model(tokenizer, recipe)
    small_base.train_base(model, small_base.token_blocks(tokenizer, texts, recipe), recipe, lambda _: None)
    model.to(torch.bfloat16).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
