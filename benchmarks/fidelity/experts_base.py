"""Train a small mixture of experts on this machine, with the quickstart's tokenizer and texts, for ``fidelity.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
sys.path.insert(0, str(QUICKSTART))

import small_base  # noqa: E402
import stdlib_rows  # noqa: E402

EXPERTS, CHOSEN = 8, 2
RATE = 3e-3


def make_experts_base(quickstart: Path, folder: Path) -> Path:
    """Train ``EXPERTS`` experts a layer, of which each token visits ``CHOSEN``, and save them in bfloat16.

    Args:
        quickstart: folder of the quickstart's base, whose tokenizer is taken.
        folder: to make.

    Returns:
        The folder, as a hub repository would hold the base.

    """
    tokenizer = AutoTokenizer.from_pretrained(quickstart)
    recipe = small_base.Recipe()
    blocks = small_base.token_blocks(tokenizer, stdlib_rows.pretraining_texts(stdlib_rows.read_modules()), recipe)
    torch.manual_seed(recipe.seed)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden,
            intermediate_size=recipe.intermediate,
            moe_intermediate_size=recipe.intermediate // CHOSEN // 32 * 32,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            head_dim=recipe.hidden // recipe.heads,
            num_experts=EXPERTS,
            num_experts_per_tok=CHOSEN,
            norm_topk_prob=True,
            max_position_embeddings=recipe.context,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, betas=(0.9, 0.95), fused=True)
    for step in range(recipe.steps):
        optimizer.param_groups[0]["lr"] = RATE * small_base.rate_at(step, recipe)
        rows = torch.arange(step * recipe.batch, (step + 1) * recipe.batch) % len(blocks)
        loss = small_base.train_step(model, blocks[rows], [optimizer], torch.float32)
    print(f"  a base of {EXPERTS} experts a layer, loss {loss:.2f} after {recipe.steps} steps", flush=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
