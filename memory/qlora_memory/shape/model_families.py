"""From ``config.json`` (and safetensors headers) to a :class:`ModelShape`.

Each family is a row of names and habits, taken from ``transformers/models/*/modeling_*.py`` 5.23; a test builds every
one with transformers and compares all names and shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_api.errors import FieldError
from qlora_memory.shape.model_shape import (
    Attention,
    AttentionKind,
    Experts,
    FeedForward,
    Head,
    Layer,
    Linear,
    ModelShape,
    Norm,
    OnDisk,
)
from qlora_memory.shape.on_disk import SOURCE
from qlora_memory.shape.safetensors_headers import TensorInfo

PACKED = frozenset({"gemma", "gemma3_text", "llama", "mistral", "opt", "phi", "qwen2", "qwen3"})
"""Model types whose rows the trainer cuts apart: ``qlora_trainer.model.device.attention.PROVEN``, as a test holds."""


@dataclass(frozen=True)
class ModelFamily:
    """Properties of a model type that ``config.json`` does not state."""

    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Names of query, key, value and output; two names: query, key and value are one layer."""
    feed_forward: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    """Names of gate, up and down; without a gate two; ``gate_up_proj`` is both."""
    inside: str = "mlp."
    """Prefix of the feed-forward layers within the decoder layer."""
    body: str = "model"
    """Prefix of the decoder layers."""
    biased: tuple[str, ...] = ()
    """Attention layers with a bias whatever the configuration says."""
    bias_key: str = ""
    """Key that gives all attention layers a bias."""
    feed_forward_bias: bool = False
    norm: Norm = Norm.RMS
    norms: int = 2
    query_key_norm: bool = False
    head_bias: bool = False
    tied: bool = False
    """Default of ``tie_word_embeddings``."""
    head_dim: int | None = None
    """Default of ``head_dim``; None: hidden / heads."""
    activation: tuple[str, str] = ("hidden_act", "silu")
    """Key and default."""
    intermediate: str = "intermediate_size"
    rotary: float = 1.0
    """Share of a head that is rotated by default; 0: positions are learned."""
    dropout: tuple[str, float] = ("", 0.0)
    """Key and default of the dropout behind attention and feed-forward part."""
    scores_cap: float | None = None
    """Default of ``attn_logit_softcapping``."""
    logits_cap: float | None = None
    """Default of ``final_logit_softcapping``."""
    experts: str = ""
    """Key of the number of experts."""


_GEMMA = ModelFamily(
    bias_key="attention_bias",
    norm=Norm.SHIFTED,
    tied=True,
    head_dim=256,
    activation=("hidden_act", "gelu_pytorch_tanh"),
)
FAMILIES: dict[str, ModelFamily] = {
    "llama": ModelFamily(bias_key="attention_bias"),
    "mistral": ModelFamily(),
    "qwen2": ModelFamily(biased=("q_proj", "k_proj", "v_proj")),
    "qwen3": ModelFamily(bias_key="attention_bias", query_key_norm=True, head_dim=128),
    "gemma": _GEMMA,
    "gemma2": ModelFamily(
        bias_key="attention_bias",
        norm=Norm.SHIFTED,
        tied=True,
        head_dim=256,
        norms=4,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        scores_cap=50.0,
        logits_cap=30.0,
    ),
    "gemma3_text": ModelFamily(
        bias_key="attention_bias",
        norm=Norm.SHIFTED,
        tied=True,
        head_dim=256,
        norms=4,
        query_key_norm=True,
        activation=("hidden_activation", "gelu_pytorch_tanh"),
    ),
    "opt": ModelFamily(
        attention=("q_proj", "k_proj", "v_proj", "out_proj"),
        feed_forward=("fc1", "fc2"),
        inside="",
        body="model.decoder",
        biased=("q_proj", "k_proj", "v_proj", "out_proj"),
        feed_forward_bias=True,
        norm=Norm.LAYER,
        tied=True,
        activation=("activation_function", "relu"),
        intermediate="ffn_dim",
        rotary=0.0,
        dropout=("dropout", 0.1),
    ),
    "phi": ModelFamily(
        attention=("q_proj", "k_proj", "v_proj", "dense"),
        feed_forward=("fc1", "fc2"),
        biased=("q_proj", "k_proj", "v_proj", "dense"),
        feed_forward_bias=True,
        norm=Norm.LAYER,
        norms=1,
        head_bias=True,
        activation=("hidden_act", "gelu_new"),
        rotary=0.5,
        dropout=("resid_pdrop", 0.0),
    ),
    "phi3": ModelFamily(
        attention=("qkv_proj", "o_proj"), feed_forward=("gate_up_proj", "down_proj"), dropout=("resid_pdrop", 0.0)
    ),
    "mixtral": ModelFamily(experts="num_local_experts"),
    "qwen2_moe": ModelFamily(biased=("q_proj", "k_proj", "v_proj"), experts="num_experts"),
    "qwen3_moe": ModelFamily(bias_key="attention_bias", query_key_norm=True, experts="num_experts"),
}


class ModelConfig:
    """The configuration of a language model, asked for what must be there."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.model_type = str(values.get("model_type", ""))

    def number(self, key: str, default: int | None = None) -> int:
        """Return a positive whole number.

        Raises:
            FieldError: it is not there.

        """
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise FieldError(
                SOURCE,
                None,
                f'the base\'s config.json has no "{key}": the memory of a "{self.model_type}" model cannot be planned',
            )
        return value

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """hidden, heads, key-value heads, layers."""
        heads = self.number("num_attention_heads")
        return (
            self.number("hidden_size"),
            heads,
            self.number("num_key_value_heads", heads),
            self.number("num_hidden_layers"),
        )


def _known(config: ModelConfig, family: ModelFamily, quantized: OnDisk | None) -> ModelShape:
    hidden, _, _, count = config.sizes
    layers = tuple(_layer(config, family, index) for index in range(count))
    vocabulary = config.number("vocab_size")
    tied = bool(config.get("tie_word_embeddings", family.tied))
    width = config.number("word_embed_proj_dim", hidden) if config.model_type == "opt" else hidden
    outside: tuple[Linear, ...] = ()
    if width != hidden:
        outside = (
            Linear(f"{family.body}.project_out", hidden, width),
            Linear(f"{family.body}.project_in", width, hidden),
        )
    positions = (config.number("max_position_embeddings", 2048) + 2) * hidden if family.rotary == 0 else 0
    norms = sum(layer.norms for layer in layers) * hidden + (hidden if _final_norm(config) else 0)
    biases = norms if family.norm is Norm.LAYER else 0
    if family.query_key_norm:
        norms += sum(2 * layer.attention.head_dim for layer in layers)
    return ModelShape(
        model_type=config.model_type,
        hidden=hidden,
        layers=layers,
        outside=outside,
        head=Head(Linear("lm_head", width, vocabulary, family.head_bias), tied, plain=_plain(config, family)),
        embeddings=vocabulary * width + positions,
        norms=norms,
        norm_biases=biases,
        routers=sum(hidden * layer.feed_forward.count for layer in layers if isinstance(layer.feed_forward, Experts)),
        final_norm=_final_norm(config),
        max_positions=config.get("max_position_embeddings"),
        on_disk=quantized,
    )


def _final_norm(config: ModelConfig) -> bool:
    return config.model_type != "opt" or bool(
        config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm", False)
    )


def _plain(config: ModelConfig, family: ModelFamily | None) -> bool:
    """Logits are not capped or scaled (``qlora_trainer.model.loss.head_is_plain`` finds the same out by trying)."""
    default = family.logits_cap if family else None
    scales = [config.get("final_logit_softcapping", default)]
    scales += [config.get(key, 1.0) for key in ("logit_scale", "logits_scaling", "lm_head_multiplier")]
    return scales[0] is None and all(scale in (None, 1, 1.0) for scale in scales[1:])


def _layer(config: ModelConfig, family: ModelFamily, index: int) -> Layer:
    prefix = f"{family.body}.layers.{index}"
    key, default = family.dropout
    return Layer(
        attention=_attention(config, family, f"{prefix}.self_attn.", index),
        feed_forward=_feed_forward(config, family, f"{prefix}.{family.inside}", index),
        norm=family.norm,
        norms=family.norms,
        dropout=float(config.get(key, default)) if key else 0.0,
    )


def _attention(config: ModelConfig, family: ModelFamily, prefix: str, index: int) -> Attention:
    hidden, heads, pairs, _ = config.sizes
    head_dim = config.number("head_dim", family.head_dim or hidden // heads)
    biased = family.biased
    if family.bias_key and config.get(family.bias_key, False):
        biased = family.attention
    if "qkv_bias" in config.values:
        biased = biased if config.get("qkv_bias") else ()
    rope = config.get("rope_parameters") or {}
    share = float(config.get("partial_rotary_factor", rope.get("partial_rotary_factor", family.rotary)))

    def linear(name: str, inputs: int, outputs: int) -> Linear:
        return Linear(prefix + name, inputs, outputs, name in biased)

    names, wide, narrow = family.attention, heads * head_dim, pairs * head_dim
    split = len(names) == 4
    return Attention(
        heads=heads,
        key_value_heads=pairs,
        head_dim=head_dim,
        kind=attention_kind(config, family),
        dropout=float(config.get("attention_dropout") or 0.0),
        rotary_dim=int(head_dim * share),
        query_key_norm=family.query_key_norm,
        query=linear(names[0], hidden, wide) if split else None,
        key=linear(names[1], hidden, narrow) if split else None,
        value=linear(names[2], hidden, narrow) if split else None,
        fused=None if split else linear(names[0], hidden, wide + 2 * narrow),
        output=linear(names[-1], wide, hidden),
        sliding_window=_window(config, index),
    )


def attention_kind(config: ModelConfig, family: ModelFamily | None = None) -> AttentionKind:
    """As ``qlora_trainer.model.device.attention.choose_attention`` chooses."""
    if config.get("attn_logit_softcapping", family.scores_cap if family else None) is not None:
        return AttentionKind.EAGER
    return AttentionKind.PACKED if config.model_type in PACKED else AttentionKind.MASKED


def _window(config: ModelConfig, index: int) -> int | None:
    window = config.get("sliding_window", 4096 if config.model_type in ("mistral", "gemma2", "gemma3_text") else None)
    if window is None:
        return None
    kinds = config.get("layer_types")
    if kinds is not None:
        return int(window) if kinds[index] == "sliding_attention" else None
    match config.model_type:
        case "gemma3_text":
            return int(window) if (index + 1) % int(config.get("sliding_window_pattern", 6)) else None
        case "gemma2":
            return None if index % 2 else int(window)
        case "mistral" | "mixtral" | "phi3":
            return int(window)
        case _:
            late = index >= int(config.get("max_window_layers", 28))
            return int(window) if config.get("use_sliding_window", False) and late else None


def _feed_forward(config: ModelConfig, family: ModelFamily, prefix: str, index: int) -> FeedForward | Experts:
    hidden = config.number("hidden_size")
    key, default = family.activation
    activation = str(config.get(key) or default)
    if not _is_sparse(config, family, index):
        wide = config.number(family.intermediate, 4 * hidden if config.model_type == "opt" else None)
        bias = family.feed_forward_bias or bool(config.get("mlp_bias", False))
        return dense(family.feed_forward, prefix, hidden, wide, activation, bias=bias)
    intermediate = config.number("intermediate_size" if config.model_type == "mixtral" else "moe_intermediate_size")
    shared = config.model_type == "qwen2_moe"
    count = config.number("num_local_experts" if config.get("num_local_experts") else family.experts)
    return Experts(
        count=count,
        per_token=config.number("num_experts_per_tok", {"mixtral": 2, "qwen2_moe": 4}.get(config.model_type, 8)),
        intermediate=intermediate,
        activation=activation,
        normalized=config.model_type == "mixtral" or bool(config.get("norm_topk_prob", False)),
        fp32_weights=config.model_type == "mixtral",
        weights=stacked(f"{prefix}experts.", count, hidden, intermediate),
        shared=dense(
            family.feed_forward,
            f"{prefix}shared_expert.",
            hidden,
            config.number("shared_expert_intermediate_size"),
            activation,
        )
        if shared
        else None,
        shared_gate=Linear(f"{prefix}shared_expert_gate", hidden, 1) if shared else None,
    )


def dense(
    names: tuple[str, ...], prefix: str, hidden: int, wide: int, activation: str, *, bias: bool = False
) -> FeedForward:
    """gate, up and down, or up and down, or gate and up in one and down."""
    fused = names[0] == "gate_up_proj"
    gate = Linear(prefix + names[0], hidden, wide, bias) if len(names) == 3 else None
    return FeedForward(
        activation=activation,
        gate=gate,
        up=Linear(prefix + names[-2], hidden, 2 * wide if fused else wide, bias),
        down=Linear(prefix + names[-1], wide, hidden, bias),
        fused=fused,
    )


def _is_sparse(config: ModelConfig, family: ModelFamily, index: int) -> bool:
    if not family.experts:
        return False
    if config.model_type == "mixtral":
        return True
    step = int(config.get("decoder_sparse_step", 1))
    return index not in (config.get("mlp_only_layers") or ()) and (index + 1) % step == 0


def stacked(prefix: str, count: int, hidden: int, wide: int) -> tuple[Linear, ...]:
    """gate and up in one, and down, of ``count`` experts."""
    return (
        Linear(f"{prefix}gate_up_proj", hidden, 2 * wide, experts=count),
        Linear(f"{prefix}down_proj", wide, hidden, experts=count),
    )


def _must_agree(shape: ModelShape, tensors: Mapping[str, TensorInfo]) -> None:
    for linear in shape.linears:
        found = tensors.get(f"{linear.name}.weight")
        if found is None:  # an older naming, which transformers translates while it loads
            continue
        packed = found.dtype in ("U8", "I8") and found.elements == -(-linear.elements // 2)
        if not packed and found.shape != (linear.outputs, linear.inputs):
            wanted = f"[{linear.outputs}, {linear.inputs}]"
            raise FieldError(
                SOURCE,
                None,
                f"config.json asks for {linear.name} of {wanted}, but the weights have {list(found.shape)}: "
                "copy the model again",
            )
