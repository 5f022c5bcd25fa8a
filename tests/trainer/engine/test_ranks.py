"""Several ranks over gloo: every ZeRO stage, optimizer and quantization trains alike, and resumes bit for bit."""

from __future__ import annotations

import pytest

from torchrun import torchrun, torchrun_once

WORKER = "ranks_worker.py"
FLOAT16 = {"quantization": {"computeType": "Float16"}, "lossScale": 4096.0}
TOKENS = {"tokens": {f"<|{number}|>": number for number in range(40, 80)}}
DROPOUT = {"lora": {"dropout": "0.1"}}

CASES = {
    "zero-0": {},
    "zero-1": {"parallelism": {"zeroStage": 1}},
    "zero-2": {"parallelism": {"zeroStage": 2}},
    "zero-3": {"parallelism": {"zeroStage": 3}},
    "paged-32-bit": {"training": {"optimizer": "PagedAdamW32Bit"}},
    "8-bit-zero-2": {"training": {"optimizer": "AdamW8Bit"}, "parallelism": {"zeroStage": 2}},
    "plain-adamw-zero-1": {"training": {"optimizer": "AdamW"}, "parallelism": {"zeroStage": 1}},
    "offload-zero-2": {"parallelism": {"zeroStage": 2, "offload": "Optimizer"}},
    "offload-zero-3": {"parallelism": {"zeroStage": 3, "offload": "Optimizer"}},
    "dora": {"lora": {"dora": True}},
    "dropout-zero-0": DROPOUT,
    "dropout-zero-2": {**DROPOUT, "parallelism": {"zeroStage": 2}},
    "checkpointing": {"checkpointing": True, "parallelism": {"zeroStage": 2}},
    "fp4": {"quantization": {"type": "FP4"}},
    "int8": {"quantization": {"type": "INT8"}},
    "16-bit": {"quantization": {"type": "None"}},
    **{f"float16-zero-{stage}": {**FLOAT16, "parallelism": {"zeroStage": stage}} for stage in range(4)},
    **{f"tokens-zero-{stage}": {**TOKENS, "parallelism": {"zeroStage": stage}} for stage in (0, 2, 3)},
    "tokens-of-a-tied-head-zero-2": {**TOKENS, "model": "opt", "parallelism": {"zeroStage": 2}},
    "tokens-of-a-tied-head-zero-3": {**TOKENS, "model": "opt", "parallelism": {"zeroStage": 3}},
    "float16-offload": {**FLOAT16, "parallelism": {"zeroStage": 2, "offload": "Optimizer"}},
}
SCALED = [name for name, case in CASES.items() if "lossScale" in case]
SAME_TRAINING = (
    "zero-1",
    "zero-2",
    "zero-3",
    "paged-32-bit",
    "8-bit-zero-2",
    "plain-adamw-zero-1",
    "offload-zero-2",
    "checkpointing",
)


@pytest.fixture(scope="module")
def on_two_ranks(tiny_models, tmp_path_factory):
    return torchrun_once(tmp_path_factory, WORKER, 2, tiny_models["llama"], CASES)


@pytest.mark.ranks
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_has_the_losses_of_the_uninterrupted_one(case, on_two_ranks):
    seen = on_two_ranks[case]
    assert seen["resumed"] == seen["onward"]
    assert seen["losses"][0] > seen["onward"][-1] or seen["norms"][0] > 0


@pytest.mark.ranks
@pytest.mark.parametrize("case", CASES)
def test_probing_the_peak_memory_leaves_nothing_behind(case, on_two_ranks):
    assert on_two_ranks[case]["rehearsed"] == on_two_ranks[case]["losses"]


@pytest.mark.ranks
@pytest.mark.parametrize("case", SAME_TRAINING)
def test_sharing_and_saving_memory_do_not_change_the_training(case, on_two_ranks):
    reference, seen = on_two_ranks["zero-0"], on_two_ranks[case]
    assert seen["losses"] == pytest.approx(reference["losses"], rel=1e-3)
    assert seen["norms"] == pytest.approx(reference["norms"], rel=2e-2)


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [2, 3])
def test_embeddings_of_tokens_are_trained_alike_in_every_stage(stage, on_two_ranks):
    reference, seen = on_two_ranks["tokens-zero-0"], on_two_ranks[f"tokens-zero-{stage}"]
    assert seen["losses"] == pytest.approx(reference["losses"], rel=1e-3)
    assert seen["norms"] == pytest.approx(reference["norms"], rel=2e-2)
    tied, other = (on_two_ranks[f"tokens-of-a-tied-head-zero-{n}"] for n in (2, 3))
    assert tied["losses"] == pytest.approx(other["losses"], rel=1e-3)


@pytest.mark.ranks
@pytest.mark.parametrize("case", SCALED)
def test_float16_with_a_loss_scale_trains_as_the_default_does(case, on_two_ranks):
    reference, seen = on_two_ranks["zero-0"], on_two_ranks[case]
    assert seen["losses"] == pytest.approx(reference["losses"], rel=2e-3)
    assert seen["norms"] == pytest.approx(reference["norms"], rel=5e-2)


@pytest.mark.ranks
@pytest.mark.parametrize("case", SCALED)
def test_an_overflow_in_float16_changes_neither_weights_nor_optimizer(case, on_two_ranks):
    seen = on_two_ranks[case]["skipped"]
    assert not seen["norm_is_finite"]
    assert not seen["changed"]


@pytest.mark.ranks
def test_one_rank_trains_as_two_do(tiny_models, tmp_path, on_two_ranks):
    alone = torchrun(WORKER, 1, tiny_models["llama"], {"zero-0": {}}, tmp_path)["zero-0"]
    together = on_two_ranks["zero-0"]
    assert alone["losses"] + alone["onward"] == pytest.approx(together["losses"] + together["onward"], rel=1e-3)


@pytest.mark.ranks
def test_a_checkpoint_holds_the_adapter_and_no_frozen_weight(on_two_ranks):
    for seen in on_two_ranks.values():
        assert all("lora_" in name or "trainable_tokens_delta" in name for name in seen["files"]["adapter"])
        assert not any("base_layer" in name or "embed" in name for name in seen["files"]["optimizer"])


@pytest.mark.ranks
def test_zero_halves_the_optimizer_state_of_each_of_two_ranks(on_two_ranks):
    whole = on_two_ranks["paged-32-bit"]["optimizer_bytes"]
    partition = on_two_ranks["plain-adamw-zero-1"]["optimizer_bytes"]
    # two moments for every weight without ZeRO; half of that, and the half of the weights itself, with it
    assert partition == pytest.approx(whole * 0.75, rel=0.02)
