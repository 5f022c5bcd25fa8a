"""Write a base of random weights with a tokenizer and rows beside it."""

from __future__ import annotations

import ast
import json
import shutil
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)

from models.tiny_config import tiny_config
from qlora_trainer.model.trial.shrink import VOCABULARY
from qlora_trainer.model.trial.toy import randomize

MODULE = "pathlib"
ROWS = 24


def all_types() -> list[str]:
    """Return the model types of all causal and composite language models of the installed transformers."""
    return sorted(
        {
            *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
            *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        }
    )


def auto_class(model_type: str) -> Any:
    """Return transformers' class that a user of the 16-bit base would load it with."""
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForCausalLM
    if model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return AutoModelForImageTextToText
    return AutoModelForMultimodalLM


def write_base(model_type: str, folder: Path, tokenizer: Path | None = None) -> None:
    """Write bf16 safetensors of a toy of a model type, and copy a tokenizer beside them."""
    torch.manual_seed(0)
    model = auto_class(model_type).from_config(tiny_config(model_type), dtype=torch.bfloat16)
    randomize(model)
    model.generation_config = GenerationConfig()
    model.save_pretrained(folder)
    if tokenizer is not None:
        shutil.copytree(tokenizer, folder, dirs_exist_ok=True)


@cache
def rows() -> list[dict[str, str]]:
    """Return signatures with the first lines of their docstrings."""
    tree = ast.parse((Path(sysconfig.get_paths()["stdlib"]) / f"{MODULE}.py").read_text("utf-8"))
    texts = [
        (f"def {node.name}({', '.join(a.arg for a in node.args.args)}):\n", text.splitlines()[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node))
    ]
    return [{"prompt": prompt, "completion": completion} for prompt, completion in texts[:ROWS]]


def write_rows(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))


def write_tokenizer(folder: Path) -> None:
    """Train a byte-level tokenizer of :data:`VOCABULARY` tokens on the rows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        (row["prompt"] + row["completion"] for row in rows()),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(folder)
