"""Next-token loss without the logits of the whole sequence.

The head is frozen, so only the gradient of its input is needed, and that can be computed while the logits of a chunk
are at hand: memory is one chunk of logits, whatever the vocabulary and the length. The idea is that of Liger's fused
linear cross-entropy (Hsu et al. 2024, section 3.2); here over target tokens only, and without a weight gradient but for
the rows of tokens whose embeddings are trained, where the head shares these.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from qlora_trainer.data.batches import IGNORED, MicroBatch
from qlora_trainer.errors import UserError
from qlora_trainer.model.composite import has_no_towers, language_model
from qlora_trainer.model.device.attention import is_packed
from qlora_trainer.model.trained_tokens import plain_head, trained_rows

log = logging.getLogger(__name__)
LOGITS_PER_CHUNK = 1 << 25
"""Logits held at once, in fp32: 128 MiB."""


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        trained: torch.Tensor | None,
        numbers: torch.Tensor | None,
    ) -> torch.Tensor:
        need_gradient = ctx.needs_input_grad[0]
        losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if need_gradient else None
        shares = None if trained is None or gradient is None else hidden.new_empty(len(hidden), len(trained))
        chunk = max(1, LOGITS_PER_CHUNK // weight.shape[0])
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = functional.linear(hidden[part], weight, bias).float()
            if trained is not None and numbers is not None:
                logits.index_copy_(1, numbers, functional.linear(hidden[part], trained).float())
            index = labels[part].unsqueeze(1)
            log_sum = logits.logsumexp(dim=1, keepdim=True)
            losses[part] = (log_sum - logits.gather(1, index)).squeeze(1)
            if gradient is not None:
                logits.sub_(log_sum).exp_()  # now probabilities
                logits.scatter_add_(1, index, torch.full_like(log_sum, -1.0))
                if trained is not None and numbers is not None and shares is not None:
                    shares[part] = logits[:, numbers]
                    logits.index_fill_(1, numbers, 0.0)
                gradient[part] = logits.to(weight.dtype) @ weight
                if trained is not None and shares is not None:
                    gradient[part] += shares[part] @ trained
            del logits  # else this chunk's would be there while the next one's are made
        ctx.save_for_backward(gradient, shares, None if shares is None else hidden)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient, shares, hidden = ctx.saved_tensors
        if gradient is None:
            return (None,) * 6
        outer = grads[0].unsqueeze(1).to(gradient.dtype)
        rows = None if shares is None else (shares * outer).t() @ hidden
        return gradient * outer, None, None, None, rows, None


def _greedy_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[N, 2] fp32 from [N, vocabulary]: the loss of each label in nats, and 1 where it is the most likely token."""
    losses = functional.cross_entropy(logits.float(), labels, reduction="none")
    return torch.stack((losses, (logits.argmax(dim=-1) == labels).float()), dim=-1)


class FrozenHead(nn.Module):
    """A frozen output head that answers with losses instead of logits where it is told what was right.

    It holds the head's own parameters, so that ZeRO-3 gathers them around its forward.

    Args:
        head: the head itself.
        trained: rows of it that are trained, and their tokens, where it shares embeddings of which some are.

    """

    def __init__(self, head: nn.Linear, trained: tuple[nn.ParameterDict, torch.Tensor] | None = None) -> None:
        super().__init__()
        self.weight = head.weight
        self.bias = head.bias
        self.trained = trained

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None, *, greedy: bool = False) -> torch.Tensor:
        """Loss of each token.

        Args:
            hidden: [N, hidden].
            labels: [N] int64, each a token to predict.
            greedy: also tell whether each label is the most likely token; without a gradient.

        Returns:
            [N] fp32, in nats; without labels [N, vocabulary] logits; with ``greedy`` [N, 2]: loss, and 1 or 0.

        """
        hidden = hidden.to(self.weight.dtype)
        if labels is None:
            return self._logits(hidden)
        if greedy:
            chunk = max(1, LOGITS_PER_CHUNK // self.weight.shape[0])
            parts = zip(torch.split(hidden, chunk), torch.split(labels, chunk), strict=True)
            return torch.cat([_greedy_losses(self._logits(part), label) for part, label in parts])
        rows, numbers = self._trained_rows()
        losses: torch.Tensor = _LinearCrossEntropy.apply(hidden, self.weight, self.bias, labels, rows, numbers)
        return losses

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, vocabulary] from [N, hidden]."""
        logits = functional.linear(hidden, self.weight, self.bias)
        rows, numbers = self._trained_rows()
        return logits if numbers is None else logits.index_copy(1, numbers, functional.linear(hidden, rows))

    def _trained_rows(self) -> tuple[Any, torch.Tensor | None]:
        """Return the rows that are trained, [rows, hidden], and their tokens, [rows]; (None, None) where none are."""
        if self.trained is None:
            return None, None
        (rows,), numbers = self.trained[0].values(), self.trained[1]
        return rows, numbers


class NextTokenLoss(nn.Module):
    """A causal language model that answers with the loss of each target token. This is what DeepSpeed wraps.

    Args:
        model: the model with its adapter (``PeftModel``).
        fused: take the head apart and use :class:`FrozenHead`; False lets the model compute its logits itself.
        row_by_row: call the model for each row alone, for models that mix rows of one sequence.

    """

    def __init__(self, model: Any, *, fused: bool, row_by_row: bool = False) -> None:
        super().__init__()
        self.model = model
        self.row_by_row = row_by_row
        self.head = FrozenHead(plain_head(model), trained_rows(model.get_output_embeddings())) if fused else None

    def forward(
        self,
        inputs: dict[str, Any],
        targets: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        greedy: bool = False,
    ) -> torch.Tensor:
        """Loss of each target token.

        Args:
            inputs: what the model is called with: input_ids and position_ids [1, T], rows by cu_seq_lens.
            targets: [N] positions whose next token counts.
            labels: [N] those next tokens.
            greedy: also tell whether each label is the most likely token.

        Returns:
            [N] fp32, in nats; without labels [N, vocabulary] logits; with ``greedy`` [N, 2]: loss, and 1 or 0.

        """
        if not self.row_by_row:
            return self._losses(inputs, targets, labels, greedy)
        return self.losses_by_row(inputs, targets, labels, greedy=greedy)

    def losses_by_row(
        self,
        inputs: dict[str, Any],
        targets: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        greedy: bool = False,
    ) -> torch.Tensor:
        """Return what :meth:`forward` does, from a call for each row."""
        return torch.cat([self._losses(*row, greedy) for row in _rows(inputs, targets, labels)])

    def _losses(
        self, inputs: dict[str, Any], targets: torch.Tensor, labels: torch.Tensor | None, greedy: bool
    ) -> torch.Tensor:
        if self.head is None:
            logits: torch.Tensor = self.model(**inputs, use_cache=False, logits_to_keep=targets).logits[0]
            if len(logits) != len(targets):  # a class that computes them all
                logits = logits[targets]
            logits = logits.float()
            if greedy and labels is not None:
                return _greedy_losses(logits, labels)
            return logits if labels is None else functional.cross_entropy(logits, labels, reduction="none")
        hidden = _backbone(self.model)(**inputs, use_cache=False).last_hidden_state
        losses: torch.Tensor = self.head(hidden[0, targets], labels, greedy=greedy)
        return losses


def _rows(
    inputs: dict[str, Any], targets: torch.Tensor, labels: torch.Tensor | None
) -> Iterator[tuple[dict[str, Any], torch.Tensor, torch.Tensor | None]]:
    """Cut the arguments of :meth:`NextTokenLoss.forward` into those of each row, without what tells rows apart."""
    starts = inputs["cu_seq_lens_q"]
    places = torch.searchsorted(targets, starts.to(targets.dtype))
    ends = torch.stack((starts.to(places.dtype), places)).tolist()
    for start, stop, first, last in zip(ends[0], ends[0][1:], ends[1], ends[1][1:], strict=False):
        row = {name: inputs[name][:, start:stop] for name in ("input_ids", "position_ids")}
        yield row, targets[first:last] - start, None if labels is None else labels[first:last]


def call_arguments(
    batch: MicroBatch, device: torch.device
) -> tuple[dict[str, torch.Tensor | int], torch.Tensor, torch.Tensor]:
    """A micro-batch as arguments of :class:`NextTokenLoss`, on ``device``.

    Targets are looked up before the move: on a GPU ``nonzero`` would wait for all that is queued.
    """
    targets = (batch.labels[0] != IGNORED).nonzero()[:, 0]
    labels = batch.labels[0, targets]
    starts = batch.cu_seqlens.to(device, non_blocking=True)
    inputs: dict[str, torch.Tensor | int] = {
        "input_ids": batch.input_ids.to(device, non_blocking=True),
        "position_ids": batch.position_ids.to(device, non_blocking=True),
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": batch.max_seqlen,
        "max_length_k": batch.max_seqlen,
    }
    return inputs, targets.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def _backbone(model: Any) -> Any:
    """Return the part of a model that ends with the last hidden state; the model itself where it cannot be told.

    Some classes, such as Llama 4's for text, name as ``base_model`` what another class calls so.
    """
    base = model.get_base_model()
    if has_no_towers(base):
        return language_model(base)[1]
    if base.base_model is not base:
        return base.base_model
    return next((child for child in base.children() if isinstance(child, PreTrainedModel)), base)


@torch.no_grad()
def head_is_plain(model: Any) -> bool:
    """Return whether the model's logits are its frozen head's output and the head's input is the last hidden state.

    Found out by trying on four tokens, with the head's output made 64 times larger on the way, so that a scale or a
    soft cap behind it (Cohere, Granite, Gemma 2) shows. False for a head that is adapted.
    """
    head, plain = model.get_output_embeddings(), plain_head(model)
    if type(plain) is not nn.Linear or any(p.requires_grad for p in plain.parameters()):
        return False
    seen: list[torch.Tensor] = []

    def enlarge(_: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        seen[:] = [arguments[0], output * 64]
        return seen[1]

    ids = torch.arange(4).unsqueeze(0)
    inputs: dict[str, Any] = {name: ids.to(plain.weight.device) for name in ("input_ids", "position_ids")}
    inputs["use_cache"] = False
    if is_packed(model.config):  # others may refuse what tells rows apart
        starts = torch.tensor([0, 4], dtype=torch.int32, device=plain.weight.device)
        inputs |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 4, "max_length_k": 4}
    was_training = model.training
    model.eval()
    hook = head.register_forward_hook(enlarge)
    try:
        logits = model(**inputs).logits
    finally:
        hook.remove()
    hidden = getattr(_backbone(model)(**inputs), "last_hidden_state", None)
    model.train(was_training)
    if hidden is None:
        return False
    hidden = hidden.to(seen[0].dtype)  # Mamba's residual stream is fp32
    return bool(torch.equal(logits, seen[1]) and torch.allclose(hidden, seen[0], rtol=1e-2, atol=1e-2))


APART_NATS, APART_MOST_NATS = 0.05, 0.5
"""Difference of a token's loss that no rounding makes, in the mean and at most; models that mix rows differ by more."""
LEAK_NATS, LEAK_TIMES = 2e-3, 4.0
"""A row's losses may follow another row's contents by so much, or by so many times what a later row's contents do."""
_TRIED = 24
"""Tokens of each row that is tried."""


@torch.no_grad()
def rows_are_apart(module: NextTokenLoss, device: torch.device) -> bool:
    """Return whether a row has the same losses packed as alone, found out by trying on three short rows.

    Not so for models with a recurrent state, or with positions that count through the whole sequence. Some of these
    refuse such rows by themselves. A state that fades changes few tokens, and those by less than rounding in other
    matrix sizes does: so the contents of the first row are changed as well, and of the last, which no token before it
    can see, for comparison.
    """
    was_training = module.training
    module.eval()
    try:
        return _are_apart(module, device)
    finally:
        module.train(was_training)


def _are_apart(module: NextTokenLoss, device: torch.device) -> bool:
    first, middle, last = (torch.arange(_TRIED) * step % 97 for step in (7, 5, 3))
    other = torch.arange(_TRIED) * 11 % 89
    arguments = call_arguments(end_to_end([first, middle, last]), device)
    try:
        together = module(*arguments)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # noqa: BLE001 each class refuses in its own way
        module.losses_by_row(*arguments)  # raises what is wrong with a row alone, too
        log.info("rows end to end are refused: %s: %s", type(error).__name__, error)
        return False
    alone = torch.cat([module(*call_arguments(end_to_end([row]), device)) for row in (first, middle, last)])
    difference = (together - alone).abs()
    # a loss that is not a number says nothing of rows; the first step will say it
    if difference.mean() > APART_NATS or difference.max() > APART_MOST_NATS:
        return False
    second = slice(_TRIED - 1, 2 * (_TRIED - 1))
    leak, rounding = (
        float((module(*call_arguments(end_to_end(rows), device)) - together)[second].abs().max())
        for rows in ([other, middle, last], [first, middle, other])
    )
    return not leak > max(LEAK_NATS, LEAK_TIMES * rounding)


def check_rows_alone(zero_stage: int, model_type: str) -> None:
    """Refuse what a model that computes each row by itself cannot be trained with.

    Raises:
        UserError: ZeRO-3.

    """
    if zero_stage == 3:
        raise UserError(
            "spec.parallelism.zeroStage",
            zero_stage,
            f'is not available for a "{model_type}" model, which mixes rows that lie end to end: each is computed by '
            "itself, and ranks with other numbers of rows would wait for each other; set 0, 1 or 2",
        )


def end_to_end(rows: list[torch.Tensor]) -> MicroBatch:
    """Rows of tokens as one micro-batch; every next token is a label."""
    starts = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    return MicroBatch(
        input_ids=torch.cat(rows)[None],
        labels=torch.cat([torch.cat([row[1:], torch.tensor([IGNORED])]) for row in rows])[None],
        position_ids=torch.cat([torch.arange(len(row)) for row in rows])[None],
        cu_seqlens=starts.to(torch.int32),
        max_seqlen=max(len(row) for row in rows),
    )
