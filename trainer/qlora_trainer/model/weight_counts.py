"""Count a base's weights on the model itself, as the ranks will hold it: built on the meta device, without weights."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from qlora_api.spec import QuantizationSpec
from qlora_memory import WeightCounts
from qlora_memory.shape.model_shape import Linear
from qlora_trainer.model.base_model import saved_buffers, skipped_modules
from qlora_trainer.model.composite import output_head_names
from qlora_trainer.model.experts.structure import expert_parameters, router_names
from qlora_trainer.model.experts.targets import layers_without_adapter, linear_layers
from qlora_trainer.model.layer_use import known_layer_use
from qlora_trainer.model.loading.hf_quantizers import FourBitConfig, FourBitQuantizer

if TYPE_CHECKING:
    from collections.abc import Iterator


def count_weights(skeleton: Any) -> WeightCounts:
    """Return what the weights of a base are used for.

    Args:
        skeleton: the base on the meta device in its compute type, which knows the use of its layers; its linear layers
            are those of a quantized base afterwards.

    """
    layers, experts, routers = linear_layers(skeleton), expert_parameters(skeleton), router_names(skeleton)
    sizes = {name: _sizes(layer) for name, layer in layers.items()}
    left = frozenset(layers_without_adapter(skeleton))
    head, embeddings = skeleton.get_output_embeddings(), skeleton.get_input_embeddings()
    head_name = next(iter(output_head_names(skeleton)), "lm_head")
    weight = getattr(head, "weight", None)
    tied = weight is None or weight is embeddings.weight
    of_layers = {f"{name}.{own}" for name in layers for own in ("weight", "bias")}
    of_head = {id(p) for p in head.parameters()} - {id(embeddings.weight)} if head is not None else set()
    tables = {id(m.weight) for m in skeleton.modules() if isinstance(m, nn.Embedding)}
    elements: Counter[str] = Counter()
    held = {**dict(skeleton.named_parameters()), **dict(saved_buffers(skeleton))}
    for name, tensor in held.items():
        if name not in of_layers and name not in experts and id(tensor) not in of_head:
            elements[_place(name, is_table=id(tensor) in tables, routers=routers)] += tensor.numel()
    quantized = _quantize(skeleton)
    fixed = list(_fixed(skeleton, {name: tensor for name, tensor in held.items() if not _is_in(name, quantized)}))
    vocabulary, width = embeddings.weight.shape if weight is None else weight.shape
    return WeightCounts(
        linears=tuple(
            Linear(name, inputs, outputs, bias, learns=name not in left, quantizable=name in quantized)
            for name, (inputs, outputs, bias) in sizes.items()
        ),
        experts=tuple(
            Linear(name, p.shape[2], p.shape[1], experts=p.shape[0], quantizable=name in quantized)
            for name, p in experts.items()
        ),
        head=Linear(head_name, width, vocabulary, getattr(head, "bias", None) is not None),
        tied=tied,
        embeddings=elements["embeddings"],
        norms=elements["norms"],
        norm_biases=elements["biases"],
        routers=elements["routers"],
        fixed=sum(count for count, _ in fixed),
        fixed_bytes=sum(size for _, size in fixed),
    )


def _sizes(layer: Any) -> tuple[int, int, bool]:
    """Return inputs, outputs and whether there is a bias."""
    rows, columns = layer.weight.shape
    is_linear = isinstance(layer, nn.Linear)
    return (columns if is_linear else rows), (rows if is_linear else columns), layer.bias is not None


def _place(name: str, *, is_table: bool, routers: frozenset[str]) -> str:
    if is_table:
        return "embeddings"
    if name.rpartition(".")[0] in routers:
        return "routers"
    return "biases" if name.endswith("bias") else "norms"


def _quantize(skeleton: Any) -> frozenset[str]:
    """Replace the layers that are quantized as they are loaded; return the names of these and of such experts."""
    skipped = skipped_modules(skeleton, QuantizationSpec(), known_layer_use(skeleton).read)
    quantizer = FourBitQuantizer(FourBitConfig(llm_int8_skip_modules=skipped), pre_quantized=False)
    quantizer._process_model_before_weight_loading(skeleton, {"": "meta"})  # noqa: SLF001 the public way loads weights
    layers = {name for name, module in skeleton.named_modules() if isinstance(module, Linear4bit)}
    return frozenset(layers | quantizer.expert_names)


def _is_in(name: str, quantized: frozenset[str]) -> bool:
    """Return whether a tensor is quantized: an expert's, or the weight of a layer."""
    return name in quantized or name.removesuffix(".weight") in quantized


def _fixed(skeleton: Any, tensors: dict[str, torch.Tensor]) -> Iterator[tuple[int, int]]:
    """Yield elements and bytes of each tensor that has another type than the compute type once it is loaded.

    As ``transformers.core_model_loading`` decides: a class may keep some in fp32, and make some of a type of its own.
    """
    kept = {re.compile(p.replace("*", ".*")): t for p, t in skeleton._get_dtype_plan(skeleton.dtype).items()}  # noqa: SLF001
    for name, tensor in tensors.items():
        dtype = next((kind for pattern, kind in kept.items() if pattern.search(name)), tensor.dtype)
        if dtype is not skeleton.dtype:
            yield tensor.numel(), tensor.numel() * dtype.itemsize
