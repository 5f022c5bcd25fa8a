"""The memory model against what torch holds: weights, constants, adapter, gradients, optimizer state, checkpoints.

Real loading, real adapters, real DeepSpeed with one rank and with two. Within 1% over 48 configurations.
"""

from __future__ import annotations

import json
import random

import pytest

from memory_models import CONFIGS, save_models
from qlora_api.spec import LoRASpec, Optimizer, ParallelismSpec, QuantizationSpec
from qlora_memory import AdapterShape, EstimateInput, Moment, estimate, model_shape, tensor_infos
from qlora_memory.optimizer import checkpoint_bytes, partitions, training_state
from qlora_trainer.model.base_model import add_lora, meta_model
from qlora_trainer.model.device.attention import PROVEN
from qlora_trainer.model.experts.targets import linear_layers
from qlora_trainer.storage.model_files import safetensors_header
from testing.shared import shared_folder
from torchrun import torchrun_once

WORKER = "memory_worker.py"
TOLERANCE = 0.01
BFLOAT16 = {"computeType": "BFloat16"}
"""On each machine, also where it is slow: what is predicted depends on it."""
QUANTIZATIONS = (
    {},
    {"doubleQuantization": False},
    {"type": "FP4"},
    {"type": "INT8"},
    {"type": "None"},
    {"computeType": "Float32"},
)
OPTIMIZERS = [str(o) for o in Optimizer]
SHARING = (
    {},
    {"zeroStage": 1},
    {"zeroStage": 2},
    {"zeroStage": 3},
    {"zeroStage": 1, "offload": "Optimizer"},
    {"zeroStage": 2, "offload": "Optimizer"},
)
NARROW = [n for n in CONFIGS if n != "wide"]


def generated(count: int, seed: int) -> dict[str, dict]:
    """Cases that go through every family, and through the rest at random."""
    draw = random.Random(seed)
    cases = {}
    for number in range(count):
        model = NARROW[number % len(NARROW)]
        quantization = draw.choice(QUANTIZATIONS)
        sharing = draw.choice(SHARING)
        if quantization.get("type") == "INT8" and sharing.get("zeroStage") == 3:
            sharing = {}
        kinds = {"phi3": ["o_proj", "down_proj"], "opt": ["q_proj", "fc2"], "phi": ["dense", "fc1"]}
        some = kinds.get(model.split("-")[0], ["q_proj", "v_proj"])
        has_experts = model in ("mixtral", "qwen2-moe", "qwen3-moe")  # which DoRA does not adapt
        cases[f"{number}-{model}"] = {
            "model": model,
            "quantization": {**BFLOAT16, **quantization},
            "lora": {
                "rank": draw.choice((1, 4, 16, 60)),
                **({"targetModules": some} if draw.random() < 0.4 else {}),
                **({"bias": draw.choice(("All", "LoRAOnly"))} if draw.random() < 0.3 else {}),
                **({"dora": True} if draw.random() < 0.2 and quantization.get("type") != "INT8" else {}),
            },
            "training": {"optimizer": draw.choice(OPTIMIZERS)},
            "parallelism": sharing,
        }
        if has_experts and cases[f"{number}-{model}"]["lora"].get("dora"):
            cases[f"{number}-{model}"]["lora"]["targetModules"] = some
    return cases


ALONE = generated(30, seed=1)
TOGETHER = {
    **generated(15, seed=2),
    **{
        f"wide-zero-{stage}": {"model": "wide", "quantization": BFLOAT16, "parallelism": {"zeroStage": stage}}
        for stage in (1, 2, 3)
    },
}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return shared_folder(tmp_path_factory, "memory-models", save_models)


@pytest.fixture(scope="session")
def on_one_rank(models, tmp_path_factory):
    return torchrun_once(tmp_path_factory, WORKER, 1, models, ALONE)


@pytest.fixture(scope="session")
def on_two_ranks(models, tmp_path_factory):
    return torchrun_once(tmp_path_factory, WORKER, 2, models, TOGETHER)


def shape_of(models, name):
    return model_shape(json.loads((models / name / "config.json").read_text()))


def near(predicted, measured):
    return predicted == pytest.approx(measured, rel=TOLERANCE, abs=64)


def compare(case, seen, models, ranks):
    shape = shape_of(models, case["model"])
    adapter = AdapterShape(shape, LoRASpec.model_validate(case.get("lora", {})))
    sharing = ParallelismSpec.model_validate(case.get("parallelism", {}))
    optimizer = Optimizer(case.get("training", {}).get("optimizer", "PagedAdamW8Bit"))
    run = EstimateInput(
        shape=shape,
        lora=adapter.lora,
        quantization=QuantizationSpec.model_validate(case.get("quantization", {})),
        optimizer=optimizer,
        parallelism=sharing,
        world_size=ranks,
        rows=(40,),
        checkpointing=False,
        cuda=False,
    )
    loaded = estimate(run).moments[Moment.LOADING]
    for component, size in seen["weights"].items():
        assert near(loaded.get(component, 0), size), component
    state = training_state(adapter, optimizer, sharing, ranks, cuda=False)
    if sharing.offload == "None":
        assert near(state.gradients, seen["gradients"])
        assert near(state.accumulating, seen["accumulating"])
        assert near(state.optimizer, seen["optimizer"])
    else:  # on a CPU it is in the same memory
        gradients = 4 * sum(partitions(adapter, sharing.zero_stage, ranks))
        assert near(state.host, seen["optimizer"] + gradients)
    assert near(checkpoint_bytes(adapter, optimizer, sharing, ranks), seen["checkpoint"])
    if seen["partitioned"]:
        held = estimate(run).moments[Moment.UPDATE]
        for component, size in seen["partitioned"].items():
            assert near(held.get(component, 0), size), component


@pytest.mark.ranks
@pytest.mark.parametrize("case", ALONE)
def test_one_rank_holds_what_is_predicted(case, on_one_rank, models):
    compare(ALONE[case], on_one_rank[case], models, ranks=1)


@pytest.mark.ranks
@pytest.mark.parametrize("case", TOGETHER)
def test_two_ranks_hold_what_is_predicted(case, on_two_ranks, models):
    compare(TOGETHER[case], on_two_ranks[case], models, ranks=2)


# -------------------------------------------------------------------------------------- the same decisions as model.py


@pytest.mark.parametrize("name", CONFIGS)
def test_the_linear_layers_are_those_the_trainer_finds(name, models):
    layers = linear_layers(meta_model(models / name))
    found = {n: (m.in_features, m.out_features, m.bias is not None) for n, m in layers.items()}
    shape = shape_of(models, name)
    assert {i.name: (i.inputs, i.outputs, i.bias) for i in shape.linears} == found


@pytest.mark.parametrize("name", CONFIGS)
def test_all_weights_are_counted(name, models):
    skeleton = meta_model(models / name)
    assert shape_of(models, name).parameters == sum(p.numel() for p in skeleton.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_headers_agree_with_the_configuration(name, models):
    folder = models / name
    tensors = tensor_infos(safetensors_header(folder / "model.safetensors"))
    assert model_shape(json.loads((folder / "config.json").read_text()), tensors) == shape_of(models, name)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        pytest.param("llama", ["q_proj", "mlp.up_proj"], id="dotted-suffix"),
        pytest.param("llama", ["model.layers.1.self_attn.v_proj"], id="one-layer"),
        pytest.param("llama", ["q_proj", "lm_head"], id="head"),
        pytest.param("qwen2-moe", ["gate_proj"], id="shared-expert"),
        pytest.param("opt-projected", ["project_in"], id="beside-the-layers"),
        pytest.param("qwen3-moe", ["experts.down_proj"], id="one-weight-of-all-experts"),
        pytest.param("qwen2-moe", ["down_proj"], id="experts-and-dense-layers-of-one-name"),
        *(pytest.param(name, None, id=f"{name}-default") for name in CONFIGS),
    ],
)
def test_adapters_are_where_the_trainer_puts_them(name, targets, models):
    lora = LoRASpec(target_modules=targets, rank=3)
    adapted = add_lora(meta_model(models / name), lora, seed=1)
    placed = {
        n.removeprefix("base_model.model.").replace(".base_layer", "")
        + (f".{m.parameter_name}" if hasattr(m, "parameter_name") else "")
        for n, m in adapted.named_modules()
        if hasattr(m, "lora_A")
    }
    adapter = AdapterShape(shape_of(models, name), lora)
    assert adapter.names == placed
    assert adapter.parameters == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_the_same_architectures_are_packed():
    from qlora_memory.shape.model_families import PACKED

    assert PACKED == PROVEN


def test_the_same_chunk_of_logits():
    from qlora_memory.activations.setting import OURS
    from qlora_trainer.model.loss import LOGITS_PER_CHUNK

    assert OURS.logits_per_chunk == LOGITS_PER_CHUNK


def test_a_model_type_that_is_not_known_is_read_from_its_headers(models, tmp_path):
    folder = models / "llama"
    config = {**json.loads((folder / "config.json").read_text()), "model_type": "novel"}
    shape = model_shape(config, tensor_infos(safetensors_header(folder / "model.safetensors")))
    known = shape_of(models, "llama")
    assert not shape.modelled
    assert shape.parameters == known.parameters
    assert {i.name for i in shape.linears} == {i.name for i in known.linears}
    assert sum(i.elements for i in shape.linears) == sum(i.elements for i in known.linears)
