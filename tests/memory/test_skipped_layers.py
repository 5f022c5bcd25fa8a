"""Memory of jobs that leave layers in 16 bits."""

from __future__ import annotations

import pytest

from qlora_api.errors import FieldError
from qlora_api.status import MemoryComponent
from qlora_memory import (
    plan,
    skipped_bytes,
)

from .shapes import figures, request

WORST = ["layers.0.self_attn.v_proj", "model.layers.31.mlp.down_proj", "layers.1.*.o_proj"]


@pytest.mark.parametrize(
    ("kind", "saved"),
    [
        pytest.param("NF4", 0.5 + 1 / 64 + 4 / 64 / 256, id="NF4"),
        pytest.param("INT8", 1, id="INT8"),
    ],
)
def test_layers_that_stay_in_16_bits_take_two_bytes_a_weight(kind, saved):
    plain, skipping = (
        plan(request(quantization__type=kind, quantization__skipModules=names, quantization__computeType="BFloat16"))
        for names in ([], WORST)
    )
    asked = request(quantization__type=kind, quantization__skipModules=WORST).spec.quantization
    count, added = skipped_bytes(skipping.shape, asked)
    elements = 4096 * 1024 + 4096 * 14336 + 4096 * 4096
    assert count == 3
    assert added == pytest.approx((2 - saved) * elements, rel=1e-3)
    held = (
        MemoryComponent.QUANTIZED_WEIGHTS,
        MemoryComponent.QUANTIZATION_CONSTANTS,
        MemoryComponent.UNQUANTIZED_WEIGHTS,
    )
    more = sum(skipping.memory.components[part] - plain.memory.components[part] for part in held)
    assert more == pytest.approx(added, abs=3 * 5 * 512)


@pytest.mark.parametrize("checkpointing", ["Full", "None"])
def test_the_last_layer_in_16_bits_leaves_the_peak_of_those_before_it(checkpointing):
    sizes = {"training__gradientCheckpointing": checkpointing, "training__microBatchSize": 1}
    last, other = (plan(request(quantization__skipModules=[f"layers.{n}.*"], **sizes)) for n in (31, 30))
    assert last.memory.components == other.memory.components


@pytest.mark.parametrize("stage", [0, 3])
def test_skipping_all_layers_but_one_needs_what_no_quantization_needs(stage):
    names = [f"{kind}_proj" for kind in ("q", "k", "v", "o", "gate", "up")]
    names += [f"layers.{index}.mlp.down_proj" for index in range(31)]
    sharing = {
        "parallelism__zeroStage": stage,
        "training__gradientCheckpointing": "Full",
        "training__microBatchSize": 1,
    }
    skipping = plan(request(world_size=2, quantization__skipModules=names, **sharing))
    plain = plan(request(world_size=2, quantization__type="None", **sharing))
    assert skipping.memory.peak_bytes == pytest.approx(plain.memory.peak_bytes, rel=0.02)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        pytest.param("layers.99.mlp.down_proj", {}, "matches no layer that would be quantized", id="no-such-layer"),
        pytest.param("lm_head", {}, "head, norms and routers stay in 16 bits", id="head"),
        pytest.param("*", {}, "leaves no layer quantized", id="all"),
        pytest.param("experts.down_proj", {"quantization__type": "INT8"}, "experts, embeddings", id="experts-in-int8"),
    ],
)
def test_a_name_that_keeps_nothing_in_16_bits_is_refused(name, changes, reason):
    config = figures().MODELS["Mixtral-8x7B"] if "experts" in name else None
    with pytest.raises(FieldError, match=reason) as caught:
        plan(request(config=config, quantization__skipModules=[name], **changes))
    assert caught.value.field == "spec.quantization.skipModules"
