"""Fields of ``spec.quantization``, ``spec.lora`` and ``spec.training``."""

from __future__ import annotations

from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Annotated, ClassVar, assert_never

from pydantic import Field, StringConstraints, field_validator

from qlora_api.base import Model, Rule, decimal
from qlora_api.spec.values import Prompt, Token


class QuantizationType(StrEnum):
    NF4 = "NF4"
    FP4 = "FP4"
    INT8 = "INT8"
    NONE = "None"

    @property
    def bits(self) -> int:
        """Bits of a quantized weight, without its constants; 16 where nothing is quantized."""
        match self:
            case QuantizationType.NF4 | QuantizationType.FP4:
                return 4
            case QuantizationType.INT8:
                return 8
            case QuantizationType.NONE:
                return 16
            case _:
                assert_never(self)

    @property
    def is_four_bit(self) -> bool:
        return self.bits == 4


class ComputeType(StrEnum):
    AUTO = "Auto"
    BFLOAT16 = "BFloat16"
    FLOAT16 = "Float16"
    FLOAT32 = "Float32"


class QuantizationSpec(Model):
    """Quantization of the frozen base. Dettmers et al. 2023 (QLoRA), sections 3 and 4."""

    type: QuantizationType = QuantizationType.NF4
    """Quantization type of the linear layers: NF4 (4-bit normal float), FP4, INT8 (LLM.int8) or None (16-bit LoRA, for
    comparison). NF4 and FP4 also quantize experts. Embeddings, the head, norms and routers stay in 16 bits. A base that
    is stored in 4 bits is loaded as it is and must be of this type."""
    double_quantization: bool = True
    """Also quantize the absmax constants of NF4 and FP4. They then take 0.127 instead of 0.5 bits per parameter."""
    compute_type: ComputeType = ComputeType.AUTO
    """Compute type of the base. Auto chooses by the device of the first attempt, and later attempts keep it:
    BFloat16 on GPUs of compute capability 8.0 or higher and on CPUs with bf16 instructions, Float16 with dynamic loss
    scaling on GPUs of capability 7.x (T4, V100), Float32 on other CPUs. Float16 is not available with type INT8."""
    skip_modules: list[
        Annotated[str, StringConstraints(min_length=1, max_length=253, pattern=r"^[A-Za-z0-9_.*-]+$")]
    ] = Field([], max_length=256)
    """Linear layers and experts that stay in 16 bits: full names or dotted suffixes, as in lora.targetModules, where *
    matches any characters (layers.0.*.down_proj). Each must match a layer that would be quantized. `qlora inspect`
    shows which layers lose most by quantization. Not available for a base that is stored quantized."""
    rules: ClassVar = (
        Rule(
            "self.type != 'None' || !has(self.skipModules) || size(self.skipModules) == 0",
            "skipModules has no effect with type None, which quantizes nothing: remove it, or set another type",
            "skipModules",
            lambda q: q.type is not QuantizationType.NONE or not q.skip_modules,
        ),
        Rule(
            "self.type != 'INT8' || self.computeType != 'Float16'",
            "computeType Float16 is not available with type INT8: set Auto, BFloat16 or Float32, or type NF4",
            "computeType",
            lambda q: q.type is not QuantizationType.INT8 or q.compute_type is not ComputeType.FLOAT16,
        ),
    )

    def skips(self, name: str) -> bool:
        """Return whether a linear layer or experts of this full name stay in 16 bits."""
        return any(is_matched(name, pattern) for pattern in self.skip_modules)


def is_matched(name: str, pattern: str) -> bool:
    """Return whether a pattern of ``skip_modules`` matches a full name or a dotted suffix of it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


class LoRABias(StrEnum):
    NONE = "None"
    ALL = "All"
    LORA_ONLY = "LoRAOnly"


class LoRASpec(Model):
    """The adapter: W + (alpha / rank)·B·A. Hu et al. 2021, section 4.1."""

    rank: int = Field(16, ge=1, le=1024)
    """Rank r of the update B·A."""
    alpha: int = Field(32, ge=1, le=65536)
    """Numerator of the scale alpha / rank."""
    dropout: decimal(0, 1, high_included=False) = "0"  # type: ignore[valid-type]
    """Probability of dropping an input of A."""
    target_modules: list[Annotated[str, StringConstraints(min_length=1, max_length=253)]] | None = Field(
        None, min_length=1, max_length=64
    )
    """Full names or dotted suffixes of the linear layers and experts (such as experts.down_proj) that get an adapter.
    Default: all but the head, which QLoRA (section 4) found necessary to match full fine-tuning. Routers get none."""
    bias: LoRABias = LoRABias.NONE
    """Biases that are trained too: None, All, or LoRAOnly (those of adapted layers)."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead. Kalajdzievski 2023."""
    dora: bool = False
    """DoRA: train magnitude and direction of the weights separately. Liu et al. 2024. Not available for experts."""
    train_tokens: list[Token] = Field([], max_length=512, json_schema_extra={"x-kubernetes-list-type": "set"})
    """Tokens whose embeddings are trained too, such as <|im_start|> if the base was not trained on it: entries of the
    tokenizer's vocabulary, or texts that it encodes as one token. An output head that is tied to the embeddings is
    trained with them. vLLM does not load such an adapter: serve the merged model."""

    @field_validator("train_tokens")
    @classmethod
    def _check_repeated(cls, tokens: list[str]) -> list[str]:
        if len(set(tokens)) < len(tokens):
            raise ValueError("must name each token once")
        return tokens


class Schedule(StrEnum):
    COSINE = "Cosine"
    LINEAR = "Linear"
    CONSTANT = "Constant"


class Optimizer(StrEnum):
    PAGED_ADAMW_8BIT = "PagedAdamW8Bit"
    PAGED_ADAMW_32BIT = "PagedAdamW32Bit"
    ADAMW_8BIT = "AdamW8Bit"
    ADAMW = "AdamW"


class GradientCheckpointing(StrEnum):
    AUTO = "Auto"
    FULL = "Full"
    NONE = "None"


class EvaluationSpec(Model):
    """Evaluation on held-out rows: interval, early stopping and sample prompts."""

    every_steps: int | None = Field(None, ge=1, le=1_000_000)
    """Steps between evaluations. Default: once an epoch. Evaluation also runs before the first step and after the
    last."""
    patience: int | None = Field(None, ge=1, le=1000)
    """Stop after this many evaluations in a row without a better loss. Default: never."""
    prompts: list[Prompt] = Field([], max_length=8)
    """Up to 8 prompts that the base and the adapter answer before the first step and after the last, with at most 64
    tokens per answer. The form depends on dataset.format: a user's message, an instruction, a prompt, or the beginning
    of a text. The report shows both answers side by side, and they are published with the adapter."""


class TrainingSpec(Model):
    """Training length, learning rate and batch size."""

    epochs: int | None = Field(None, ge=1, le=1000)
    """Passes over the training rows. Exactly one of epochs and maxSteps is set."""
    max_steps: int | None = Field(None, ge=1, le=10_000_000)
    """Optimizer steps."""
    learning_rate: decimal(0, 1, low_included=False) = "2e-4"  # type: ignore[valid-type]
    """Peak learning rate."""
    schedule: Schedule = Schedule.COSINE
    """Learning-rate schedule after warmup. Cosine and Linear decay to zero."""
    warmup_steps: int = Field(0, ge=0, le=1_000_000)
    """Steps over which the learning rate rises linearly from zero."""
    global_batch_size: int = Field(16, ge=1, le=65536)
    """Sequences per optimizer step over all ranks; the same on any number of GPUs."""
    micro_batch_size: int | None = Field(None, ge=1, le=4096)
    """Sequences per forward pass on one rank. Default: the fastest size that fits the GPU, divides the rank's share of
    the global batch and keeps microBatchSize × maxLength at or below 8192 tokens. If the GPU is unknown, the largest
    such size."""
    optimizer: Optimizer = Optimizer.PAGED_ADAMW_8BIT
    """Optimizer. The paged ones can move their state to host memory when GPU memory is short; without CUDA, the
    non-paged variant is used."""
    weight_decay: decimal(0, 1) = "0"  # type: ignore[valid-type]
    """Decoupled weight decay on A and B; never on biases, magnitudes and embeddings."""
    max_grad_norm: decimal(0, 1000) = "0.3"  # type: ignore[valid-type]
    """Clip the global gradient norm to this; 0 switches clipping off. QLoRA, appendix B.2."""
    gradient_checkpointing: GradientCheckpointing = GradientCheckpointing.AUTO
    """Recompute activations in the backward pass: Full, None or Auto. Auto recomputes as little as the GPU's memory
    allows; it means Full if the GPU is unknown, and None on a CPU."""
    evaluation: EvaluationSpec = EvaluationSpec()
    seed: int = Field(42, ge=0, le=2147483647)
    """Seed of adapter initialization, dropout, data order and the held-out rows."""
    rules: ClassVar = (
        Rule(
            "has(self.epochs) != has(self.maxSteps)",
            "set exactly one of epochs and maxSteps",
            "epochs",
            lambda t: (t.epochs is None) != (t.max_steps is None),
        ),
        Rule(
            "!has(self.maxSteps) || self.warmupSteps < self.maxSteps",
            "warmupSteps must be less than maxSteps",
            "warmupSteps",
            lambda t: t.max_steps is None or t.warmup_steps < t.max_steps,
        ),
    )
