"""The experts of each layer, from the names and shapes of a base's tensors.

On disk they are a matrix for each expert and product, or one tensor of all; transformers 5 loads both as one parameter
for gate and up, and one for down (``transformers.conversion_mapping``).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

from qlora_memory.shape.model_shape import Linear
from qlora_memory.shape.safetensors_headers import TensorInfo

_OWN = re.compile(r"^(?P<prefix>.*\.(?P<layer>\d+)\..*experts)\.\d+\.(?P<part>\w+)\.weight$")
"""A matrix of one expert: ``model.layers.0.mlp.experts.17.up_proj.weight``."""
_STACKED = re.compile(r"^(?P<prefix>.*\.(?P<layer>\d+)\..*?)(?:\.experts)?\.(?P<part>\w+?)(?:\.weight)?$")
"""A tensor of all: ``model.layers.0.mlp.experts.gate_up_proj``, ``….block_sparse_moe.input_linear.weight``."""
_LAYER = re.compile(r"\.(\d+)\.")
_DOWN = frozenset({"down_proj", "w2", "fc2", "down_projs", "output_linear"})
_STACK_DIMENSIONS = 3


def stack_name(name: str, tensor: TensorInfo) -> str | None:
    """Return the parameter that a tensor becomes a part of; None for one that is no expert's."""
    match = None
    if len(tensor.shape) == _STACK_DIMENSIONS - 1:
        match = _OWN.match(name)
    elif len(tensor.shape) == _STACK_DIMENSIONS and min(tensor.shape) > 1:  # a convolution over channels has a 1
        match = _STACKED.match(name)
    if match is None:
        return None
    weight = "down_proj" if match["part"] in _DOWN else "gate_up_proj"
    return f"{match['prefix'].removesuffix('.experts')}.experts.{weight}"


def expert_stacks(tensors: Mapping[str, TensorInfo], hidden: int) -> dict[int, tuple[Linear, ...]]:
    """Return the weights of the experts of each layer that has any: gate and up in one, then down.

    Tensors that cannot be such matrices, such as the kernel of a convolution that is named as these are, are left out.

    Args:
        tensors: of all files.
        hidden: features that go into a layer and come out of it.

    """
    elements: dict[str, int] = defaultdict(int)
    counts: dict[str, int] = defaultdict(int)
    for name, tensor in tensors.items():
        stack = stack_name(name, tensor)
        if stack is not None:
            is_whole = len(tensor.shape) == _STACK_DIMENSIONS
            elements[stack] += tensor.elements
            counts[stack] = max(counts[stack], tensor.shape[0] if is_whole else int(name.rsplit(".", 3)[1]) + 1)
    found: dict[int, tuple[Linear, ...]] = defaultdict(tuple)
    for stack in sorted(elements, reverse=True):  # gate_up_proj before down_proj
        count = counts[stack]
        other, rest = divmod(elements[stack], count * hidden)
        if rest or not other:
            continue
        inputs, outputs = (other, hidden) if stack.endswith("down_proj") else (hidden, other)
        found[int(_LAYER.findall(stack)[0])] += (Linear(stack, inputs, outputs, experts=count),)
    return found
