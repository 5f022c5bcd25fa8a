"""Safetensors headers from bytes."""

from __future__ import annotations

import json

import pytest

from qlora_api.errors import FieldError
from qlora_memory import HeaderError, TensorInfo, header_length, model_shape, parse_header, shard_names
from qlora_memory.shape.model_shape import Experts

from .shapes import LLAMA_8B, llama_8b


def encoded(header):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


def test_a_header_is_read():
    file = encoded({"__metadata__": {"format": "pt"}, "w": {"dtype": "BF16", "shape": [3, 4], "data_offsets": [0, 24]}})
    length = header_length(file)
    assert parse_header(file[8 : 8 + length]) == {"w": TensorInfo("BF16", (3, 4))}


@pytest.mark.parametrize("first", [b"", b"short", b"\0" * 8, b"\xff" * 8], ids=["empty", "short", "zero", "huge"])
def test_what_is_no_safetensors_file_is_refused(first):
    with pytest.raises(HeaderError):
        header_length(first)


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"w": {}}', b'{"w": 1}'])
def test_headers_that_cannot_be_read_are_refused(text):
    with pytest.raises(HeaderError):
        parse_header(text)


def test_shards_are_named_by_the_index():
    assert shard_names(b'{"weight_map": {"a": "m-2.safetensors", "b": "m-1.safetensors"}}') == [
        "m-1.safetensors",
        "m-2.safetensors",
    ]
    for bad in (b"[]", b"{}", b'{"weight_map": {"a": "../m.safetensors"}}', b'{"weight_map": {}}'):
        with pytest.raises(HeaderError):
            shard_names(bad)


def test_weights_that_contradict_the_configuration_are_named():
    tensors = {"model.layers.0.self_attn.q_proj.weight": TensorInfo("BF16", (4096, 2048))}
    with pytest.raises(FieldError, match=r"asks for model.layers.0.self_attn.q_proj of \[4096, 4096\]"):
        model_shape(LLAMA_8B, tensors)


def test_weights_that_are_packed_already_agree():
    tensors = {"model.layers.0.self_attn.q_proj.weight": TensorInfo("U8", (8388608, 1))}
    quantized = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    shape = model_shape({**LLAMA_8B, "quantization_config": quantized}, tensors)
    assert shape.on_disk is not None
    assert (shape.on_disk.type, shape.on_disk.double) == ("NF4", False)
    assert shape.linears == llama_8b().linears


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        pytest.param({"model_type": "novel"}, None, "from its configuration alone", id="no-headers"),
        pytest.param(
            {"quantization_config": {"quant_method": "gptq"}}, None, "quantized with gptq", id="other-quantization"
        ),
    ],
)
def test_what_cannot_be_planned_says_why(config, tensors, message):
    with pytest.raises(FieldError, match=message):
        model_shape({**LLAMA_8B, **config}, tensors)


def test_a_base_without_layers_that_are_named_so_is_not_planned():
    tensors = {
        "embed_tokens.weight": TensorInfo("BF16", (100, 32)),
        "encoder.block.weight": TensorInfo("BF16", (32, 32)),
    }
    with pytest.raises(FieldError, match="no weights that are named as decoder layers are"):
        model_shape({"model_type": "own", "hidden_size": 32}, tensors)


def test_a_convolution_over_groups_of_channels_is_no_stack_of_experts():
    tensors = {
        "embed_tokens.weight": TensorInfo("BF16", (100, 32)),
        "layers.0.mlp.up_proj.weight": TensorInfo("BF16", (64, 32)),
        "layers.0.mixer.conv1d.weight": TensorInfo("BF16", (6, 2, 3)),
    }
    shape = model_shape({"model_type": "own", "hidden_size": 32}, tensors)
    assert not isinstance(shape.layers[0].feed_forward, Experts)
    assert (shape.embeddings, shape.norms) == (100 * 32, 6 * 2 * 3)
