"""Errors of several layers together, their bytes, and which to leave in 16 bits."""

from __future__ import annotations

import math
from io import StringIO

import pytest
import yaml
from rich.console import Console

from qlora_api.spec.learning import QuantizationType
from qlora_cli.inspection import view
from qlora_cli.inspection.inspected_layers import BLOCKS, FORMATS, InspectedLayer, Inspection, error_of, sorted_by_name
from qlora_cli.inspection.page import page


def test_every_quantization_type_is_inspected():
    assert {quantization.type for quantization in FORMATS.values()} == set(QuantizationType) - {QuantizationType.NONE}


def layer(name, error, *, outputs=64, inputs=128, experts=1, squares=1.0):
    blocks = {str(block): error for block in BLOCKS}
    return InspectedLayer(
        name=name,
        outputs=outputs,
        inputs=inputs,
        experts=experts,
        squares=squares,
        errors={"NF4": blocks, "NF4+DQ": blocks, "FP4": blocks, "INT8": error / 10},
        constants={str(block): {"count": 128, "offset": 0.1, "error": 0.002} for block in BLOCKS},
        outliers={"3": 0.01, "6": 0.0},
        largest=5.0,
    )


LAYERS = sorted_by_name(
    [
        layer("model.layers.10.mlp.down_proj", 0.11),
        layer("model.layers.2.mlp.down_proj", 0.12, squares=3.0),
        layer("model.layers.2.self_attn.q_proj", 0.09),
        layer("model.layers.2.mlp.experts.down_proj", 0.10, experts=4),
    ]
)
FOUND = Inspection("base", LAYERS)


def test_layers_are_in_the_order_of_their_numbers():
    assert [found.name.split(".")[2] for found in LAYERS] == ["2", "2", "2", "10"]


def test_errors_of_several_layers_are_weighed_by_their_norms():
    want = math.sqrt((0.12**2 * 3 + 0.09**2 + 0.1**2 + 0.11**2) / 6)
    assert error_of(LAYERS, "NF4+DQ") == pytest.approx(want)
    without = math.sqrt((0.09**2 + 0.1**2 + 0.11**2) / 6)
    assert FOUND.error_without(FOUND.worst(1)) == pytest.approx(without)


def test_the_worst_layers_come_first_and_experts_are_a_kind_of_their_own():
    assert [found.error("NF4") for found in FOUND.worst(3)] == [0.12, 0.11, 0.10]
    assert list(FOUND.kinds()) == ["down_proj", "experts.down_proj", "q_proj"]


@pytest.mark.parametrize(
    ("form", "block", "bits"),
    [
        ("NF4", 64, 4 + 32 / 64),
        ("NF4", 32, 4 + 32 / 32),
        ("NF4+DQ", 64, 4 + 8 / 64 + 32 / 64 / 256),
        ("FP4", 256, 4 + 32 / 256),
        ("INT8", 64, 8 + 32 / 4096),
    ],
)
def test_bits_are_those_of_weights_and_constants(form, block, bits):
    """QLoRA, section 3: 0.5 and 0.127 bits a weight for constants at block size 64."""
    found = layer("x", 0.1, outputs=4096, inputs=4096)
    assert 8 * found.bytes(form, block) / found.linear.elements == pytest.approx(bits, abs=1e-3)


def test_a_layer_is_named_by_the_shortest_end_that_no_other_has():
    twins = [layer("vision.layers.0.mlp.fc1", 0.1), layer("text.layers.0.mlp.fc1", 0.1)]
    assert FOUND.pattern(LAYERS[-1]) == "layers.10.mlp.down_proj"
    assert Inspection("base", tuple(twins)).pattern(twins[0]) == "vision.layers.0.mlp.fc1"


def test_text_json_and_page_name_the_same_layers():
    console = Console(width=120, file=StringIO())
    console.print(view.show(FOUND, 2))
    text = console.file.getvalue()
    names = ["layers.2.mlp.down_proj", "layers.10.mlp.down_proj"]
    assert all(f"- {name}" in text for name in names)
    assert view.as_dict(FOUND, 2)["skipModules"] == names
    assert yaml.safe_load(view.skip_modules(FOUND, 2)) == {"quantization": {"skipModules": names}}
    html = page(FOUND, 2)
    assert all(f"- {name}" in html for name in names)
    assert "<script" not in html


def test_no_layer_is_named_where_none_is_asked_for():
    assert view.as_dict(FOUND, 0)["skipModules"] == []
    assert "skipModules" not in page(FOUND, 0)
