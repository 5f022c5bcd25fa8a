"""Experts are quantized while the base is loaded: one of them is in memory in 16 bits at a time."""

import weakref

import torch
from torch import nn

from qlora_trainer.model.loading.hf_quantizers import FourBitConfig, FourBitQuantizer

EXPERTS = 3


def test_an_expert_is_freed_before_the_next_is_read():
    model = nn.Module()
    model.weight = nn.Parameter(torch.empty(EXPERTS, 64, 64, dtype=torch.bfloat16, device="meta"), requires_grad=False)
    quantizer = FourBitQuantizer(FourBitConfig(bnb_4bit_quant_type="nf4"))
    quantizer.expert_names, quantizer.device = frozenset({"weight"}), torch.device("cpu")
    read: list[weakref.ref[torch.Tensor]] = []

    def read_expert(index: int) -> torch.Tensor:
        assert [reference() for reference in read] == [None] * index
        expert = torch.randn(64, 64, dtype=torch.bfloat16)
        read.append(weakref.ref(expert))
        return expert

    quantizer.pack(model, "weight", read_expert)
    assert len(read) == EXPERTS
