"""Real tokenizers, trained on the standard library's sources, and builders of specs and rows."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qlora_api.spec import (
    DatasetSource,
    DatasetSpec,
    EvaluationData,
    ModelSpec,
    OutputSpec,
    QLoRAJobSpec,
    TrainingSpec,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from qlora_trainer.data.rows.read import Row

SPECIAL = ["<bos>", "<eos>", "<|im_start|>", "<|im_end|>"]

CHATML = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

CHATML_MARKED = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}
{% else %}{{ message.content }}<|im_end|>{% endif %}

{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def _corpus() -> list[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    return [(library / name).read_text("utf-8") for name in ("argparse.py", "ast.py", "textwrap.py", "heapq.py")]


def _byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen; offsets without spaces, as GPT-2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return tokenizer


def _metaspace() -> Tokenizer:
    """As Llama 2: a space stands before every text, and a begin token before that."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<unk>", *SPECIAL],
        initial_alphabet=["\n"],
        show_progress=False,
        max_token_length=12,
    )
    tokenizer.train_from_iterator((line for text in _corpus() for line in text.splitlines()), trainer)
    begin = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", begin)])
    return tokenizer


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    return _byte_level()


@pytest.fixture
def tokenizer(byte_level: Tokenizer) -> PreTrainedTokenizerFast:
    """A base model's: an end token, no begin token, no chat template."""
    return PreTrainedTokenizerFast(tokenizer_object=byte_level, eos_token="<eos>")


@pytest.fixture
def chat_tokenizer(byte_level: Tokenizer) -> PreTrainedTokenizerFast:
    """An instruction-tuned model's, with an unmarked ChatML template."""
    return PreTrainedTokenizerFast(tokenizer_object=byte_level, eos_token="<|im_end|>", chat_template=CHATML)


@pytest.fixture(scope="session")
def begin_tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=_metaspace(), bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def chatml() -> str:
    return CHATML


@pytest.fixture(scope="session")
def chatml_marked() -> str:
    return CHATML_MARKED


@pytest.fixture(scope="session")
def dataset() -> Callable[..., DatasetSpec]:
    def build(**fields: Any) -> DatasetSpec:
        return DatasetSpec(train=DatasetSource(source="rows"), **fields)

    return build


@pytest.fixture(scope="session")
def job(dataset: Callable[..., DatasetSpec]) -> Callable[..., QLoRAJobSpec]:
    def build(
        seed: int = 1, fraction: str | None = None, eval_source: str | None = None, **fields: Any
    ) -> QLoRAJobSpec:
        held_out = EvaluationData(fraction=fraction, source=eval_source) if fraction or eval_source else None
        return QLoRAJobSpec(
            model=ModelSpec(source="base"),
            dataset=dataset(eval=held_out, **fields),
            training=TrainingSpec(epochs=1, seed=seed),
            output=OutputSpec(destination="adapter"),
        )

    return build


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: list[Row], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def pairs() -> list[Row]:
    """Prompts and completions of many lengths: lines of a source file and what follows them."""
    lines = [line for line in _corpus()[1].splitlines() if line.strip()]
    return [{"prompt": lines[i], "completion": "\n".join(lines[i + 1 : i + 2 + i % 5])} for i in range(0, 600, 6)]
