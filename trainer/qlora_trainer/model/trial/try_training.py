"""Do with a toy on the CPU what a rank does with the base: load, adapt, compare, train.

What fails there would fail in each attempt, unless the fault is the toy's or this machine's. A toy shows nothing of the
base where its own class does not read it as it was written, or cannot compute with it; nothing is shown either where a
kernel is missing on a CPU, or where a plain Llama fails, too. The base then goes on without a trial.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaConfig

from qlora_api.spec import ComputeType, LoRASpec, QuantizationSpec, QuantizationType
from qlora_trainer.errors import UserError
from qlora_trainer.model.base_model import add_lora, causal_config, load_base, meta_model, trainable
from qlora_trainer.model.dry_run import idle_layers_error
from qlora_trainer.model.experts.targets import is_target
from qlora_trainer.model.loss import NextTokenLoss, call_arguments, end_to_end, head_is_plain, rows_are_apart
from qlora_trainer.model.trial.toy import NoToyError, read_toy, write_toy

if TYPE_CHECKING:
    from qlora_api.spec import QLoRAJobSpec

CPU = torch.device("cpu")
EXACT = QuantizationSpec(type=QuantizationType.NONE, compute_type=ComputeType.FLOAT32)
TOKENS, TOKEN_NUMBERS = 24, 97
STEPS, MICRO_BATCHES = 2, 2
"""A class that keeps something of one forward pass fails in the next."""
STEP_SIZE = 1e-3
SAME_LOGITS = 1e-2
"""Largest distance of logits from those of the base's own class, as a share of their deviation (median token)."""
PLAIN = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
"""A model that any machine can train which can train at all."""
LACKS_OF_A_MACHINE = ("not implemented for", "can't allocate memory")
"""Words of errors that are of no model."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrialResult:
    """The findings of a trial."""

    mixes_rows: bool
    """Rows that lie end to end influence each other on this machine."""


@dataclass(frozen=True)
class _Found:
    mixes_rows: bool
    apart: float
    """Distance of the logits from those of the base's own class."""
    idle: tuple[str, ...]
    """Adapted layers that learn nothing."""


class _NothingShownError(Exception):
    """The trial says nothing of the base."""


def try_training(base: Path, spec: QLoRAJobSpec, source: str) -> TrialResult | None:
    """Try with a toy whether a base can be trained as the job says; return None where that cannot be told.

    Args:
        base: folder of the base.
        spec: of the job.
        source: of the base, by which errors name it.

    Raises:
        UserError: it cannot.

    """
    config = causal_config(base)
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(0)
        try:
            found = _try(config, spec)
            if (problem := _problem(found, spec.lora, source)) is None:
                return TrialResult(found.mixes_rows)
        except _NothingShownError as error:
            log.info("the base cannot be tried: %s", error)
            return None
        except Exception as error:  # noqa: BLE001 each class fails in its own way
            problem = UserError("spec.model.source", source, _sentence(config.model_type, error))
            problem.__cause__ = error
        if (reason := _fault_of_this_machine(spec)) is not None:
            log.info("the base cannot be tried on this machine: a plain Llama fails, too: %s; %s", reason, problem)
            return None
        raise problem


def _try(config: Any, spec: QLoRAJobSpec) -> _Found:
    """Train a toy of a configuration.

    Raises:
        _NothingShownError: this shows nothing of the base.
        Exception: training fails.

    """
    with TemporaryDirectory(prefix="toy-") as name:
        folder = Path(name)
        try:
            wanted = _write_and_compute(config, folder)
            lora = _targets_in(folder, spec.lora)
        except Exception as error:
            raise _NothingShownError(f"at toy size: {type(error).__name__}: {error}") from error
        try:
            return _train_toy(folder, spec.quantization, lora, wanted)
        except Exception as error:
            if isinstance(error, MemoryError) or any(words in str(error) for words in LACKS_OF_A_MACHINE):
                raise _NothingShownError(f"on this machine: {type(error).__name__}: {error}") from error
            if _is_fp32(spec.quantization) or (own := _fault_of_class(folder)) is None:
                raise
            raise _NothingShownError(f"its own class fails in bf16 on a CPU: {own}") from error


def _write_and_compute(config: Any, folder: Path) -> torch.Tensor:
    """Write a toy, and return the logits that its own class computes with it.

    Raises:
        NoToyError: the class reads another model than it wrote.
        Exception: what the class raises.

    """
    wanted = _logits_of_class(write_toy(config, folder))
    if (apart := _distance(_logits_of_class(read_toy(folder, torch.float32)), wanted)) > SAME_LOGITS:
        raise NoToyError(f"its class does not read what it wrote: logits differ by {apart:.0%} of their deviation")
    return wanted


def _fault_of_class(folder: Path) -> str | None:
    """Return how a toy's own class fails with it in bf16, without quantization and adapter; None where it does not."""
    try:
        _logits_of_class(read_toy(folder, torch.bfloat16))
    except Exception as error:  # noqa: BLE001 each class fails in its own way
        return f"{type(error).__name__}: {error}"
    return None


def _fault_of_this_machine(spec: QLoRAJobSpec) -> str | None:
    """Return how a plain Llama fails here with the job's settings; None where it can be trained."""
    plain = spec.model_copy(update={"lora": spec.lora.model_copy(update={"target_modules": None})})
    try:
        problem = _problem(_try(LlamaConfig(**PLAIN), plain), plain.lora, "a plain Llama")
    except Exception as error:  # noqa: BLE001 whatever it is
        return f"{type(error).__name__}: {error}"
    return None if problem is None else str(problem)


def _problem(found: _Found, lora: LoRASpec, source: str) -> UserError | None:
    if found.apart > SAME_LOGITS:
        return UserError(
            "spec.model.source",
            source,
            f"is of a class that computes other logits for a text without its other inputs (by {found.apart:.0%} of "
            "their deviation): an adapter that is trained here would not be the one that is served",
        )
    return idle_layers_error([*found.idle], lora, source) if found.idle else None


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute in one thread: with matrices of this size more would spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _row(step: int = 7) -> torch.Tensor:
    return torch.arange(TOKENS) * step % TOKEN_NUMBERS


def _trained_tokens(lora: LoRASpec) -> dict[str, int]:
    """Return as many tokens of the first row as a job trains, or all of them: those that it names need not be there."""
    return dict(zip(lora.train_tokens, _row().tolist(), strict=False))


def _logits_of_class(model: Any) -> torch.Tensor:
    """Return the logits of a row as the base's own class computes them, where a gradient gets through it, too."""
    ids = _row()[None]
    model.train()
    model(input_ids=ids, use_cache=False).logits.float().sum().backward()
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    return found


def _targets_in(folder: Path, lora: LoRASpec) -> LoRASpec:
    """Return an adapter for the toy: of layers that the job names those that are in it."""
    toy = meta_model(folder)
    names = [name for name, _ in (*toy.named_modules(), *toy.named_parameters())]
    found = [t for t in lora.target_modules or () if any(is_target(n, t) for n in names)]
    return lora.model_copy(update={"target_modules": found or None})


def _is_fp32(quantization: QuantizationSpec) -> bool:
    return quantization.compute_type is ComputeType.FLOAT32


def _train_toy(folder: Path, quantization: QuantizationSpec, lora: LoRASpec, wanted: torch.Tensor) -> _Found:
    exact = _module(folder, EXACT, lora).eval()
    exact.row_by_row = mixes = not rows_are_apart(exact, CPU)
    rows = call_arguments(end_to_end([_row()]), CPU)
    with torch.no_grad():
        apart = _distance(exact(*rows[:2]), wanted)
    del exact
    if apart > SAME_LOGITS:
        return _Found(mixes, apart, ())
    kind = ComputeType.FLOAT32 if _is_fp32(quantization) else ComputeType.BFLOAT16
    module = _module(folder, quantization.model_copy(update={"compute_type": kind}), lora)
    return _Found(mixes, apart, tuple(_train(module, row_by_row=mixes)))


def _module(folder: Path, quantization: QuantizationSpec, lora: LoRASpec) -> NextTokenLoss:
    model = add_lora(load_base(folder, quantization, CPU), lora, seed=1, tokens=_trained_tokens(lora))
    return NextTokenLoss(model, fused=head_is_plain(model))


def _train(module: NextTokenLoss, *, row_by_row: bool) -> list[str]:
    """Take a few steps of two micro-batches, each followed by an evaluation; return layers that learn nothing.

    Only those whose like learns nothing in any layer: no token may have come to an expert.
    """
    module.row_by_row = row_by_row
    batch = call_arguments(end_to_end([_row(step)[:length] for step, length in ((7, 24), (5, 9), (3, 17))]), CPU)
    learning = trainable(module.model)
    last = {name.split(".lora_")[0]: p for name, p in learning.items() if ".lora_B." in name}  # others begin with zeros
    reached: set[str] = set()
    for _ in range(STEPS):
        module.train()
        for _ in range(MICRO_BATCHES):
            module(*batch).mean().backward()
        reached |= {_without_numbers(n) for n, p in last.items() if p.grad is not None and p.grad.any()}
        with torch.no_grad():
            for parameter in learning.values():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=STEP_SIZE)
                    parameter.grad = None
            module.eval()
            module(*batch)
    return sorted(n.removeprefix("base_model.model.") for n in last if _without_numbers(n) not in reached)


def _without_numbers(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return how far logits are apart, as a share of their deviation: of the median token.

    Rounding sends a few tokens to other experts, and those are far apart.
    """
    size = wanted.std().clamp(min=torch.finfo(wanted.dtype).tiny)
    return float((found - wanted).norm(dim=-1).median() / (size * wanted.shape[-1] ** 0.5))


def _sentence(model_type: str, error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    last = next((f for f in reversed(frames) if "modeling_" in f.filename), frames[-1])
    text = " ".join(str(error).split())[:300]
    return (
        f'is of the type "{model_type}", which cannot be trained here: a trial at toy size ends in '
        f"{type(error).__name__}: {text} ({Path(last.filename).name}:{last.lineno} {last.name})"
    )
