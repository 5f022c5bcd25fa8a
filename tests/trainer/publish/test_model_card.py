"""The model card is readable by the Hub and tells people how to load the adapter."""

from dataclasses import replace

import pytest
import yaml

from qlora_trainer.publish.model_card import model_card


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_the_front_matter_is_what_the_hub_reads(job, make_facts):
    front = front_matter(model_card(job, 1, make_facts()))
    assert front == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "qlora"],
    }


def test_the_training_is_summed_up(job, make_facts):
    card = model_card(job, 2, make_facts())
    for row in (
        "| Base held as | in NF4, double-quantized |",
        "| LoRA | rank 16, alpha 32, dropout 0 |",
        "| Steps | 90 published of 100 |",
        "| Tokens | 123,456 |",
        "| Eval loss | 2.5000 → 1.2500 |",
        f"| Run | `team/tune` `{job.uid}`, attempt 2 |",
    ):
        assert row in card


def test_without_evaluation_no_loss_is_claimed(job, make_facts):
    assert "| Eval loss | not measured → not measured |" in model_card(
        job, 1, make_facts(base_eval_loss=None, eval_loss=None)
    )


def test_the_same_facts_make_the_same_card(job, make_facts):
    assert model_card(job, 1, make_facts()) == model_card(job, 1, make_facts())


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        pytest.param({}, "vllm serve org/base --enable-lora --max-lora-rank 16 ", id="rank-as-it-is"),
        pytest.param({"lora": {"rank": 20}}, "--max-lora-rank 32 ", id="next-rank-vllm-knows"),
        pytest.param({"lora": {"rank": 1024}}, "its rank 1024 is above 512", id="rank-too-high"),
        pytest.param({"lora": {"dora": True}}, "it uses DoRA", id="dora"),
        pytest.param({"lora": {"bias": "All"}}, "it has trained biases", id="biases"),
        pytest.param({"model": {"source": "s3://models/x"}}, '"s3://models/x"', id="base-not-on-the-hub"),
        pytest.param({"quantization": {"type": "None"}}, "trained with the base in 16 bits", id="not-quantized"),
        pytest.param({"quantization": {"type": "INT8"}}, "with the base in INT8.", id="int8"),
    ],
)
def test_the_card_says_how_this_adapter_is_served(job, make_facts, groups, said):
    assert said in model_card(job, 1, make_facts(**groups))


def test_what_is_quantized_and_adapted_is_said(job, make_facts):
    found = replace(
        make_facts(),
        quantized="97.2% of 30,532 weights",
        adapted="16 of 16 linear layers, the experts of 2 of 2 layers",
    )
    card = model_card(job, 1, found)
    assert "| Base held as | in NF4, double-quantized: 97.2% of 30,532 weights |" in card
    assert "head, and experts: 16 of 16 linear layers, the experts of 2 of 2 layers |" in card


def test_an_adapter_on_experts_is_served_merged(job, make_facts):
    card = model_card(job, 1, replace(make_facts(), adapts_experts=True))
    assert "vLLM does not serve this adapter by itself, since it adapts experts." in card
