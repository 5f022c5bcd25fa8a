"""Generate answers to the job's own prompts before and after training, for the report.

There is no key-value cache. Up to a micro-batch of prompts are packed into one sequence, as rows are in training, and
each new token takes one forward pass of the model in its training form: slow compared with an inference server, short
compared with the training.

All ranks run the loop token by token, although with ZeRO 0 to 2 only rank 0 computes. So no rank waits for longer than
one token, a stop request is noticed between two tokens, and a failure costs only the answers.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import torch

from qlora_trainer.checkpoint import engine_state
from qlora_trainer.checkpoint.checkpoint_store import unpack_tensors
from qlora_trainer.data.formats import Encoder
from qlora_trainer.liveness.heartbeat import Section
from qlora_trainer.model.loss import call_arguments, end_to_end
from qlora_trainer.model.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from qlora_trainer.training.context import RunState, TrainingContext

NEW_TOKENS = 64
"""Maximum length of an answer."""
log = logging.getLogger(__name__)


def answer_before(context: TrainingContext, run: RunState) -> None:
    """Generate the base's answers: before the first step, the adapter changes nothing (B is zero). A collective."""
    if run.step == 0:
        answer(context, "base")


def answer_after(context: TrainingContext) -> None:
    """Generate the answers of the adapter that is loaded. A collective."""
    answer(context, "adapter")


def load_chosen_adapter(context: TrainingContext, run: RunState) -> None:
    """Load the adapter that will be published, where prompts or tasks need it. A collective."""
    spec = context.config.spec
    if not spec.training.evaluation.prompts and spec.evaluate is None:
        return
    ranks, store = context.ranks, context.checkpoints
    with context.ranks.heartbeat.during(Section.CHECKPOINT):
        chosen = store.chosen() if ranks.is_first else None
        step = ranks.gather(chosen.step if chosen else None)[0]
        if step is not None and step != run.step:
            weights = (chosen or store.at(step)).read(engine_state.ADAPTER_FILE)
            engine_state.load_adapter_tensors(context.model, unpack_tensors(weights))


def all_ranks_compute(context: TrainingContext) -> bool:
    """Return whether the model is partitioned (ZeRO stage 3), so that every rank takes part in each forward pass."""
    return context.config.spec.parallelism.zero_stage == 3


def rank_computes(context: TrainingContext) -> bool:
    """Return whether this rank runs the model; the other ranks only wait."""
    return context.ranks.is_first or all_ranks_compute(context)


def answer(context: TrainingContext, who: str) -> None:
    """Record the answer of ``who`` (``base`` or ``adapter``) to each prompt in the history. A collective."""
    spec, began = context.config.spec, time.monotonic()
    prompts = spec.training.evaluation.prompts
    if not prompts:
        return
    tokenizer = load_tokenizer(context.prepared.model_path, spec.dataset.chat_template)
    encoder = Encoder(tokenizer, spec.dataset, conversations=context.data.receipt.conversations)
    ends = end_tokens(context, tokenizer)
    texts: dict[str, str] = {}
    with context.ranks.heartbeat.during(Section.EVALUATE):
        for start in range(0, len(prompts), context.config.batch.micro_batch_size):
            some = prompts[start : start + context.config.batch.micro_batch_size]
            rows = continue_rows(context, [encoder.prompt(prompt) for prompt in some], ends, encoder.end)
            if rows is None:
                return
            texts |= zip(some, (tokenizer.decode(row, skip_special_tokens=True) for row in rows), strict=True)
    context.history.answers(who, texts)
    log.info("the %s answered %d prompts in %.1f s", who, len(prompts), time.monotonic() - began)


def end_tokens(context: TrainingContext, tokenizer: Any) -> set[int]:
    """Return the tokens that end an answer: the tokenizer's end token, and those of the model's own generation."""
    named = context.model.generation_config.eos_token_id
    every = (tokenizer.eos_token_id, *(named if isinstance(named, list) else [named]))
    return {token for token in every if token is not None}


def continue_rows(
    context: TrainingContext, prompts: Sequence[list[int]], ends: Collection[int], learned_end: tuple[int, ...] = ()
) -> list[list[int]] | None:
    """Continue each row greedily until an end token or the maximum length, and return the new tokens.

    A continuation ends at one of the tokens ``ends``, or at ``learned_end``, the tokens that end the rows' answers.

    A collective. Return None on all ranks if one was told to stop, or if rank 0, computing alone, failed.
    """
    ranks = context.ranks
    rows = [list(prompt) for prompt in prompts]
    going = set(range(len(rows))) if rank_computes(context) else set()
    context.engine.eval()
    for _ in context.recorder.count(range(NEW_TOKENS), NEW_TOKENS, "tokens of each answer"):
        failed = False
        if going or all_ranks_compute(context):
            try:
                going -= _one_more(context, rows, going, ends, learned_end)
            except RuntimeError as error:  # out of memory among them
                if all_ranks_compute(context):
                    raise
                log.warning("prompts are left unanswered: %s", error)
                failed = True
        still, over = ranks.sum(len(going), failed or context.stop.is_set)
        if over or not still:
            break
    context.engine.train()
    return None if over else [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


@torch.no_grad()
def _one_more(
    context: TrainingContext,
    rows: list[list[int]],
    going: Collection[int],
    ends: Collection[int],
    learned_end: tuple[int, ...],
) -> set[int]:
    """Append the most likely token to each unfinished row; return the rows that are now finished."""
    batch = end_to_end([torch.tensor(row) for row in rows])
    inputs, _, _ = call_arguments(batch, context.ranks.device)
    last = (batch.cu_seqlens[1:] - 1).to(context.ranks.device)
    over = set()
    for number, token in enumerate(context.engine(inputs, last).argmax(dim=-1).tolist()):
        if token in ends or len(rows[number]) == context.config.spec.dataset.max_length:
            over.add(number)
        elif number in going:
            rows[number].append(token)
            if learned_end and tuple(rows[number][-len(learned_end) :]) == learned_end:
                del rows[number][-len(learned_end) :]
                over.add(number)
    return over
