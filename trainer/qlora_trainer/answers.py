"""What the model answers to the job's own prompts before the training and after it, for whoever reads the report.

No cache of keys and values: the prompts lie end to end in one sequence, as rows in training do, and each new token
takes one forward pass of the model as it is trained. That is slow beside a server and quick beside a training.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import torch

from qlora_trainer import state
from qlora_trainer.chat import load_tokenizer
from qlora_trainer.checkpoints import unpack_tensors
from qlora_trainer.data.formats import Encoder
from qlora_trainer.loss import call_arguments, end_to_end

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from qlora_trainer.attempt import Run, Trainer

NEW_TOKENS = 64
"""Of an answer at most."""
log = logging.getLogger(__name__)


def answer_before(trainer: Trainer, run: Run) -> None:
    """Have the base answer, B being zero before the first step. A collective under ZeRO-3."""
    if run.step == 0:
        answer(trainer, "base")


def answer_after(trainer: Trainer, run: Run) -> None:
    """Have the adapter answer that will be published, whose weights the model then has. A collective under ZeRO-3."""
    if not asks(trainer):
        return
    chosen = trainer.checkpoints.best() or trainer.checkpoints.newest()
    if chosen is not None and chosen.step != run.step:
        state.load_adapter_tensors(trainer.model, unpack_tensors(chosen.read(state.ADAPTER_FILE)))
    answer(trainer, "adapter")


def asks(trainer: Trainer) -> bool:
    """Whether this rank has anything to do here: under ZeRO-3 no rank has the model alone."""
    spec = trainer.config.spec
    return bool(spec.training.evaluation.prompts) and (trainer.ranks.is_first or spec.parallelism.zero_stage == 3)


def answer(trainer: Trainer, who: str) -> None:
    """Note in the history what ``who`` says to each prompt."""
    if not asks(trainer):
        return
    began, spec = time.monotonic(), trainer.config.spec
    prompts = spec.training.evaluation.prompts
    tokenizer = load_tokenizer(trainer.prepared.model_path, spec.dataset.chat_template)
    encoder = Encoder(tokenizer, spec.dataset)
    with trainer.board.section("Evaluate"):
        rows = continue_rows(trainer, [encoder.prompt(prompt) for prompt in prompts], end_tokens(trainer, tokenizer))
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    trainer.history.answers(who, dict(zip(prompts, texts, strict=True)))
    log.info("the %s answered %d prompts in %.1f s", who, len(prompts), time.monotonic() - began)


def end_tokens(trainer: Trainer, tokenizer: Any) -> set[int]:
    """What ends an answer: the tokenizer's end token, and those that the model's own generation stops at."""
    named = trainer.model.generation_config.eos_token_id
    return {
        token
        for token in (tokenizer.eos_token_id, *(named if isinstance(named, list) else [named]))
        if token is not None
    }


@torch.no_grad()
def continue_rows(trainer: Trainer, prompts: Sequence[list[int]], ends: Collection[int]) -> list[list[int]]:
    """The likeliest continuation of each row of tokens, up to one of ``ends`` or the longest row there may be."""
    engine, ranks = trainer.engine, trainer.ranks
    rows = [list(prompt) for prompt in prompts]
    most = trainer.config.spec.dataset.max_length  # as far as positions are known to go
    over: set[int] = set()
    together = trainer.config.spec.parallelism.zero_stage == 3  # then no rank may stop before another
    engine.eval()
    for _ in range(NEW_TOKENS):
        if len(over) == len(rows) and not together:
            break
        batch = end_to_end([torch.tensor(row) for row in rows])
        inputs, _, _ = call_arguments(batch, ranks.device)
        last = (batch.cu_seqlens[1:] - 1).to(ranks.device)
        for number, token in enumerate(engine(inputs, last).argmax(dim=-1).tolist()):
            if token in ends or len(rows[number]) == most:
                over.add(number)
            if number not in over:
                rows[number].append(token)
        ranks.heartbeat.beat()
    engine.train()
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
