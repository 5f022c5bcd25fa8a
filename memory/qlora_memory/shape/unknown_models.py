"""A base whose model type is not among :data:`qlora_memory.shape.model_families.FAMILIES`.

Headers name every tensor with its shape; what each is used for is taken from its name. Prepare builds the model itself
and counts there instead (``ModelShape.counted``). The activations are taken to be those of a Llama of the same sizes,
and the shape says so (``ModelShape.modelled``).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from qlora_api.errors import FieldError
from qlora_memory.shape.expert_tensors import expert_stacks, stack_name
from qlora_memory.shape.model_families import FAMILIES, ModelConfig, _plain, attention_kind
from qlora_memory.shape.model_shape import (
    Attention,
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

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
_EMBEDDING = re.compile(r"embed(?![a-z_]*proj)|wte|wpe")
_HEAD = ("lm_head.weight", "embed_out.weight", "output.weight")
_KEPT = re.compile(r"(?:mamba|mixer)\.dt_proj$|(?:prediction|correction)_coefs$|\.indexer\.weights_proj$")
"""Matrices that a model reads itself, so that they stay as they are: ``qlora_trainer.model.dry_run`` finds them out."""
_KEPT_BY_KERNELS = re.compile(r"(?:mamba|mixer)\.(?:x_proj|out_proj)$")
"""Such that fused kernels read, in the model types that call them."""
_FUSED = frozenset({"bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "mamba", "mamba2", "nemotron_h"})
_ROUTERS = (".gate.weight", ".router.weight", ".router.layer.weight", ".router.classifier.weight", ".wg.weight")
_IDLE = re.compile(r"\.(?:indexer|encoder_attn|encoder_attention|crossattention)\.")
"""Layers that no gradient reaches: they choose what attention looks at, or look at an encoder that is not there."""
_HIDDEN = ("hidden_size", "n_embd", "n_embed", "d_model", "dim")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_PAIRS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token", "top_k")
_HEAD_DIM = 64
"""Head size of models whose configuration has no heads, such as Mamba."""
_ROLES = {
    "query": ("q_proj", "query", "wq"),
    "key": ("k_proj", "key", "wk"),
    "value": ("v_proj", "value", "wv"),
    "fused": ("qkv_proj", "query_key_value", "Wqkv"),
    "output": ("o_proj", "out_proj", "dense", "wo"),
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "fc1", "dense_h_to_4h", "w3", "gate_up_proj"),
    "down": ("down_proj", "fc2", "dense_4h_to_h", "w2"),
}
_ROLE_OF = {name: role for role, names in _ROLES.items() for name in names}


@dataclass(frozen=True)
class WeightCounts:
    """The weights of a base, sorted by what they are used for; tied ones once."""

    linears: tuple[Linear, ...]
    """All linear layers but the head and routers."""
    experts: tuple[Linear, ...]
    """The stacked weights of all experts, of each layer in the order in which they are multiplied."""
    head: Linear
    """From hidden features to the vocabulary."""
    tied: bool
    """The head's weight is that of the embeddings."""
    embeddings: int
    norms: int
    """Elements of norms' weights and of all that has no other place."""
    norm_biases: int
    routers: int
    fixed: int = 0
    fixed_bytes: int = 0
    """Bytes of the elements whose type does not follow the compute type."""


def shape_of_tensors(
    config: ModelConfig, tensors: Mapping[str, TensorInfo] | None, quantized: OnDisk | None
) -> ModelShape:
    """Return the shape of a model type that is not known here.

    Args:
        config: of the language model.
        tensors: of it.
        quantized: how the base is quantized on disk.

    Raises:
        FieldError: there are no tensors, they are packed, or they are no decoder's.

    """
    if not tensors or quantized is not None:
        problem = (
            "not from quantized weights. Use the 16-bit base"
            if tensors
            else "not from its configuration alone. Plan without --model-config, with its weights reachable"
        )
        raise FieldError(
            SOURCE,
            None,
            f'"{config.model_type}" is not a known architecture ({", ".join(FAMILIES)}): its memory is planned from '
            f"16-bit weights, {problem}",
        )
    return shape_of_counts(config, _count_by_names(config, tensors))


def _count_by_names(config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> WeightCounts:
    """Sort the tensors of a base by what their names say.

    Raises:
        FieldError: none is named as embeddings are.

    """
    vocabulary, width = _token_table(tensors).shape
    stacks = expert_stacks(tensors, _first(config, _HIDDEN, width))
    of_experts = {weight.name for layer in stacks.values() for weight in layer}
    linears: list[Linear] = []
    elements = {"embeddings": 0, "norms": 0, "biases": 0, "routers": 0}
    for name, tensor in tensors.items():
        if stack_name(name, tensor) in of_experts or (name.endswith(_HEAD) and not _LAYER.search(name)):
            continue
        if (linear := _linear(name, tensor, tensors, config.model_type)) is not None:
            linears.append(linear)
        elif not _is_bias_of_layer(name, tensors, config.model_type):
            elements[_place(name, tensor)] += tensor.elements
    return WeightCounts(
        linears=tuple(linears),
        experts=tuple(weight for layer in stacks.values() for weight in layer),
        head=Linear("lm_head", width, vocabulary, "lm_head.bias" in tensors),
        tied=bool(config.get("tie_word_embeddings", False)) or not any(n.endswith(_HEAD) for n in tensors),
        embeddings=elements["embeddings"],
        norms=elements["norms"],
        norm_biases=elements["biases"],
        routers=elements["routers"],
    )


def shape_of_counts(config: ModelConfig, counts: WeightCounts, *, exact: bool = False) -> ModelShape:
    """Return the shape of a base with its weights as they were counted, and the activations of a Llama.

    Args:
        config: of the language model.
        counts: of its weights.
        exact: they were counted on the model itself.

    Raises:
        FieldError: no layer has a number.

    """
    hidden = _first(config, _HIDDEN, counts.head.inputs)
    heads = _first(config, _HEADS, max(1, hidden // _HEAD_DIM))
    pairs = _first(config, _PAIRS, heads)
    sizes = hidden, heads, pairs, _first(config, ("head_dim",), hidden // heads)
    found: dict[int, list[Linear]] = defaultdict(list)
    stacks: dict[int, list[Linear]] = defaultdict(list)
    outside: list[Linear] = []
    for linear in counts.linears:
        layer = _LAYER.search(linear.name)
        (found[int(layer[1])] if layer else outside).append(linear)
    for weight in counts.experts:
        numbers = [int(part) for part in weight.name.split(".") if part.isdigit()]
        stacks[numbers[0] if numbers else 0].append(weight)
    layers = tuple(_layer(config, sizes, found[i], tuple(stacks[i])) for i in sorted({*found, *stacks}))
    if not layers:
        raise FieldError(
            SOURCE, None, "has no weights that are named as decoder layers are: its memory cannot be planned"
        )
    return ModelShape(
        model_type=config.model_type,
        hidden=hidden,
        layers=layers,
        outside=tuple(outside),
        head=Head(counts.head, counts.tied, plain=_plain(config, None)),
        embeddings=counts.embeddings,
        norms=counts.norms,
        norm_biases=counts.norm_biases,
        routers=counts.routers,
        max_positions=config.get("max_position_embeddings"),
        modelled=False,
        counted=exact,
        fixed=counts.fixed,
        fixed_bytes=counts.fixed_bytes,
    )


def _token_table(tensors: Mapping[str, TensorInfo]) -> TensorInfo:
    """Return the embeddings of tokens: the tallest matrix that is named as embeddings are.

    Raises:
        FieldError: there are none.

    """
    tables = [t for n, t in tensors.items() if len(t.shape) == 2 and _EMBEDDING.search(n) and not _LAYER.search(n)]
    if not tables:
        raise FieldError(SOURCE, None, "has no weights that are named as embeddings are: its memory cannot be planned")
    return max(tables, key=lambda table: table.shape[0])


def _is_bias_of_layer(name: str, tensors: Mapping[str, TensorInfo], model_type: str) -> bool:
    """Return whether a tensor is the bias of a linear layer, which counts it; a router's is counted by itself."""
    weight = f"{name.removesuffix('.bias')}.weight"
    if not name.endswith(".bias") or weight not in tensors:
        return False
    return _linear(weight, tensors[weight], tensors, model_type) is not None


def _linear(name: str, tensor: TensorInfo, tensors: Mapping[str, TensorInfo], model_type: str) -> Linear | None:
    """Matrices named ``*.weight`` are linear layers, but for embeddings, experts and routers.

    Experts and routers are parameters in transformers (``conversion_mapping.py``).
    """
    module = name.removesuffix(".weight")
    if len(tensor.shape) != 2 or module == name or _EMBEDDING.search(name) or _is_expert(name):
        return None
    outputs, inputs = tensor.shape
    bias = tensors.get(f"{module}.bias")
    if bias is not None and bias.shape == (inputs,) != (outputs,):  # stored the other way round, as GPT-2's are
        outputs, inputs = inputs, outputs
    is_kept = bool(_KEPT.search(module)) or (model_type in _FUSED and bool(_KEPT_BY_KERNELS.search(module)))
    learns = not is_kept and not _IDLE.search(name)
    return Linear(module, inputs, outputs, bias is not None, learns=learns, quantizable=not is_kept)


def _is_expert(name: str) -> bool:
    return ".experts." in name or name.endswith(_ROUTERS)


def _place(name: str, tensor: TensorInfo) -> str:
    if _is_expert(name):
        return "routers"
    if _EMBEDDING.search(name) and len(tensor.shape) == 2:
        return "embeddings"
    return "biases" if name.endswith("bias") else "norms"


def _layer(
    config: ModelConfig, sizes: tuple[int, int, int, int], linears: list[Linear], stacks: tuple[Linear, ...]
) -> Layer:
    """Linear layers put in the places of a Llama's, those that fit none beside them."""
    place: dict[str, Linear] = {}
    others: list[Linear] = []
    for linear in linears:
        role = _ROLE_OF.get(linear.kind)
        if role is None or role in place:
            others.append(linear)
        else:
            place[role] = linear
    if stacks and "up" not in place:  # no dense part beside the experts
        others += [place.pop(role) for role in ("gate", "down") if role in place]
    hidden, count, pairs, head_dim = sizes
    missing = Linear("", hidden, 0)
    attention = Attention(
        heads=count,
        key_value_heads=pairs,
        head_dim=head_dim,
        kind=attention_kind(config),
        rotary_dim=head_dim,
        query=place.get("query"),
        key=place.get("key"),
        value=place.get("value"),
        fused=place.get("fused"),
        output=place.get("output"),
    )
    activation = str(config.get("hidden_act") or config.get("activation_function") or "silu")
    dense = FeedForward(
        activation=activation,
        gate=place.get("gate"),
        up=place.get("up", missing),
        down=place.get("down", missing),
        fused=place.get("up", missing).kind == "gate_up_proj",
    )
    if not stacks:
        return Layer(attention, dense, Norm.RMS, others=tuple(others))
    experts = Experts(
        count=stacks[0].experts,
        per_token=_first(config, _PER_TOKEN, 2),
        intermediate=stacks[-1].inputs,
        activation=activation,
        normalized=bool(config.get("norm_topk_prob", True)),
        fp32_weights=False,
        weights=stacks,
        shared=dense if dense.up.outputs else None,
    )
    return Layer(attention, experts, Norm.RMS, others=tuple(others))


def _first(config: ModelConfig, keys: tuple[str, ...], default: int) -> int:
    """Return the first whole number among the values of some keys."""
    found = (config.get(key) for key in keys)
    return next((n for n in found if isinstance(n, int) and not isinstance(n, bool) and n > 0), default)
