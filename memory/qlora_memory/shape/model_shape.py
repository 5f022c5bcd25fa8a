"""The shape of a base model: all that its memory depends on, and nothing of its weights.

A :class:`ModelShape` is made by :func:`qlora_memory.shape.read_shape.model_shape` from ``config.json`` and, where there
are any, the headers of its safetensors files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from qlora_api.spec import QuantizationType


@dataclass(frozen=True)
class Linear:
    """A linear layer, y = W·x + b with W [outputs, inputs], or one weight of all experts of a layer."""

    name: str
    """Full name of the module, such as ``model.layers.0.self_attn.q_proj``."""
    inputs: int
    outputs: int
    bias: bool = False
    experts: int = 1
    """Number of such matrices stacked in one parameter."""
    learns: bool = True
    """An adapter is on it by default (``qlora_trainer.model.experts.targets.layers_without_adapter``)."""
    quantizable: bool = True
    """False: it stays in 16 bits in every job, such as one whose weight the model reads itself."""

    @property
    def elements(self) -> int:
        return self.experts * self.inputs * self.outputs

    @property
    def kind(self) -> str:
        """Last part of the name, by which adapters are placed."""
        return self.name.rpartition(".")[2]


class Norm(StrEnum):
    RMS = "RMS"
    """One kernel on a GPU. On a CPU written out: computes on an fp32 copy of its input, which it keeps."""
    SHIFTED = "Shifted"
    """Gemma's, with 1 + weight: written out everywhere."""
    LAYER = "Layer"
    """``torch.nn.functional.layer_norm``: keeps its input."""


class AttentionKind(StrEnum):
    """Attention that the trainer chooses for a type (``qlora_trainer.model.device.attention.choose_attention``)."""

    PACKED = "Packed"
    """Rows are cut apart: variable-length flash attention on a GPU, one call for each row on a CPU."""
    MASKED = "Masked"
    """Scaled-dot-product attention with a mask of [T, T]."""
    EAGER = "Eager"
    """Scores of [heads, T, T], as for capped scores (Gemma 2)."""


@dataclass(frozen=True)
class Attention:
    """Self-attention of one layer."""

    heads: int
    key_value_heads: int
    head_dim: int
    kind: AttentionKind
    dropout: float = 0.0
    """Dropout probability of the attention scores."""
    rotary_dim: int = 0
    """Dimensions of a head that are rotated; 0: learned positions."""
    query_key_norm: bool = False
    """RMS norm over each head's query and key (Qwen 3, Gemma 3)."""
    query: Linear | None = None
    key: Linear | None = None
    value: Linear | None = None
    fused: Linear | None = None
    """Query, key and value in one layer (Phi 3), in place of the three."""
    output: Linear | None = None
    sliding_window: int | None = None


@dataclass(frozen=True)
class FeedForward:
    """gate, up and down (SwiGLU and the like), or up and down alone."""

    activation: str
    """Its name in transformers' ``ACT2FN``."""
    up: Linear
    down: Linear
    gate: Linear | None = None
    fused: bool = False
    """``up`` computes gate and up at once (Phi 3)."""


@dataclass(frozen=True)
class Experts:
    """A mixture of experts.

    Their weights are three-dimensional parameters (``transformers.integrations.moe``), which the trainer packs in 4
    bits and adapts (``qlora_trainer.model.experts``); in INT8 they stay in 16 bits.
    """

    count: int
    per_token: int
    intermediate: int
    activation: str
    normalized: bool
    """The chosen experts' weights are divided by their sum."""
    fp32_weights: bool
    """The routing weights stay in fp32 (Mixtral)."""
    weights: tuple[Linear, ...]
    """Stacked matrices of the experts: gate and up in one, and down."""
    shared: FeedForward | None = None
    """Expert that every token visits (Qwen 2 MoE)."""
    shared_gate: Linear | None = None
    """Gate of that expert."""


@dataclass(frozen=True)
class Layer:
    """A decoder layer."""

    attention: Attention
    feed_forward: FeedForward | Experts
    norm: Norm
    norms: int = 2
    """2: before attention and before the feed-forward part; 4: after each as well (Gemma 2 and 3); 1: one for both,
    which run side by side (Phi)."""
    dropout: float = 0.0
    """Dropout probability of what attention and feed-forward part add to the residual stream."""
    others: tuple[Linear, ...] = ()
    """Linear layers whose place is not known here."""

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """All linear layers, in no particular order."""
        a, f = self.attention, self.feed_forward
        found = [a.query, a.key, a.value, a.fused, a.output]
        inner = f.shared if isinstance(f, Experts) else f
        found += [inner.gate, inner.up, inner.down] if inner else []
        found += [f.shared_gate] if isinstance(f, Experts) else []
        return (*(linear for linear in found if linear is not None and linear.outputs), *self.others)

    @property
    def weights(self) -> tuple[Linear, ...]:
        """All that can be quantized."""
        return (*self.linears, *self.experts)

    @property
    def experts(self) -> tuple[Linear, ...]:
        """The weights of the experts."""
        return self.feed_forward.weights if isinstance(self.feed_forward, Experts) else ()


@dataclass(frozen=True)
class Head:
    """The output head: hidden → vocabulary."""

    linear: Linear
    tied: bool
    """Its weight is that of the embeddings."""
    plain: bool = True
    """Logits are the head's output as it is, so that the trainer takes it apart
    (``qlora_trainer.model.loss.FrozenHead``); not so for scaled or capped logits."""


@dataclass(frozen=True)
class OnDisk:
    """Quantization that a base has on disk."""

    type: QuantizationType
    double: bool


@dataclass(frozen=True)
class ModelShape:
    """A causal language model."""

    model_type: str
    hidden: int
    layers: tuple[Layer, ...]
    outside: tuple[Linear, ...]
    """Linear layers beside the decoder layers and the head."""
    head: Head
    embeddings: int
    """Elements of token and position embeddings; the head's too where it is tied."""
    norms: int
    """Elements of all norms' weights."""
    norm_biases: int = 0
    routers: int = 0
    """Elements of routers, which stay as they are."""
    final_norm: bool = True
    max_positions: int | None = None
    on_disk: OnDisk | None = None
    modelled: bool = True
    """False: the activations are those of a Llama of the same sizes, since those of the model type are not known."""
    counted: bool = False
    """The weights were counted on the model itself, which Prepare builds without them; else they follow from names."""
    fixed: int = 0
    """Number of elements whose type does not follow the compute type, such as routers that stay in fp32."""
    fixed_bytes: int = 0
    """Bytes of these elements."""

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """All linear layers but the head: what is quantized and adapted, unless they say otherwise.

        The same decision as ``qlora_trainer.model.experts.targets.linear_layers``.
        """
        return (*(linear for layer in self.layers for linear in layer.linears), *self.outside)

    @cached_property
    def experts(self) -> tuple[Linear, ...]:
        """The weights of all experts; by default adapted.

        The same decision as ``qlora_trainer.model.experts.structure.expert_parameters``.
        """
        return tuple(weight for layer in self.layers for weight in layer.experts)

    @property
    def largest(self) -> int:
        """Elements of the largest linear layer's weight: what is dequantized at once."""
        return max((linear.elements for linear in self.linears), default=0)

    @property
    def parameters(self) -> int:
        """Elements of all weights, tied ones once."""
        head = self.head.linear
        weights = sum(linear.elements for linear in self.linears) + (0 if self.head.tied else head.elements)
        biases = sum(linear.outputs for linear in (*self.linears, head) if linear.bias)
        return (
            weights
            + biases
            + self.embeddings
            + self.norms
            + self.norm_biases
            + self.routers
            + sum(i.elements for i in self.experts)
        )

    def active_linear_elements(self) -> int:
        """Weights that take part in computing one token, head and chosen experts included."""
        return sum(i.elements for i in self.linears) + self.head.linear.elements + sum(self._active_experts())

    def _active_experts(self) -> Iterator[int]:
        for layer in self.layers:
            if isinstance(layer.feed_forward, Experts):
                experts = layer.feed_forward
                chosen = sum(weight.elements for weight in experts.weights) * experts.per_token // experts.count
                yield chosen + self.hidden * experts.count
