"""Measure models in this process for ``fidelity.py``: quantization error, packing, merging."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.utils.integrations import dequantize_bnb_weight
from safetensors.torch import load_file

from qlora_api.spec import LoRASpec, QuantizationSpec, QuantizationType
from qlora_trainer.checkpoint import engine_state
from qlora_trainer.data.batches import eval_batches
from qlora_trainer.data.packing import unpacked
from qlora_trainer.model.base_model import add_lora, load_base
from qlora_trainer.model.experts.targets import linear_layers
from qlora_trainer.model.loss import NextTokenLoss, call_arguments
from qlora_trainer.publish.merge_adapter import merge

if TYPE_CHECKING:
    from pathlib import Path

    from qlora_trainer.data.packing import Sequences
    from qlora_trainer.data.tokenized_rows import TokenizedRows
    from qlora_trainer.prepare.tokenize_rows import PreparedData

CPU = torch.device("cpu")
UNQUANTIZED = QuantizationSpec(type=QuantizationType.NONE)
KINDS = {
    "NF4": QuantizationSpec(double_quantization=False),
    "NF4 + DQ": QuantizationSpec(),
    "FP4 + DQ": QuantizationSpec(type=QuantizationType.FP4),
}


def quantization_errors(base: Path) -> dict[str, dict[str, float]]:
    """Relative Frobenius error ‖W - Q(W)‖ / ‖W‖ by quantization and by kind of layer, over all layers."""
    exact = {n: m.weight.float() for n, m in linear_layers(load_base(base, UNQUANTIZED, CPU)).items()}
    found: dict[str, dict[str, float]] = {}
    for kind, quantization in KINDS.items():
        sums: dict[str, list[float]] = {}
        for name, layer in linear_layers(load_base(base, quantization, CPU)).items():
            assert isinstance(layer, Linear4bit)
            difference = dequantize_bnb_weight(layer.weight, state=layer.weight.quant_state).float() - exact[name]
            both = sums.setdefault(name.rsplit(".", 1)[-1], [0.0, 0.0])
            both[0] += difference.square().sum().item()
            both[1] += exact[name].square().sum().item()
        found[kind] = {layer: (error / norm) ** 0.5 for layer, (error, norm) in sums.items()}
    return found


def trained(base: Path, quantization: QuantizationSpec, checkpoint: Path) -> Any:
    """The base with the adapter of a checkpoint, as the trainer holds both."""
    model = add_lora(load_base(base, quantization, CPU), LoRASpec(), seed=0)
    engine_state.load_adapter_tensors(model, load_file(checkpoint / engine_state.ADAPTER_FILE))
    return model.eval()


@torch.no_grad()
def token_losses(
    model: Any, rows: TokenizedRows, sequences: Sequences, *, leak: bool = False
) -> dict[int, torch.Tensor]:
    """Losses of each row's target tokens, by row, whatever rows it shares a sequence with.

    With ``leak`` rows see those before them: what packing must not do, and the measurement must be able to see.
    """
    loss = NextTokenLoss(model, fused=True)
    found: dict[int, torch.Tensor] = {}
    for index, separate in enumerate(eval_batches(rows, sequences, 1, 1, 0)):
        length = separate.input_ids.shape[1]
        one = {"cu_seqlens": torch.tensor([0, length], dtype=torch.int32), "max_seqlen": length}
        batch = replace(separate, **one) if leak else separate
        losses = loss(*call_arguments(batch, CPU))
        members = sequences.rows(index).tolist()
        counts = [int(rows.target_counts[row]) for row in members]
        found |= dict(zip(members, losses.split(counts), strict=True))
    return found


@dataclass(frozen=True)
class Packing:
    """Differences of a token's loss in a pack and on its own, relative to the mean loss."""

    largest: float
    mean: float
    mean_with_leak: float
    """What the mean would be if rows saw each other."""


def packing_difference(base: Path, compute: str, checkpoint: Path, data: PreparedData) -> Packing:
    """Compare per-token losses of rows in packs and on their own."""
    assert data.eval is not None
    assert data.eval_packs is not None
    model = trained(base, QuantizationSpec.model_validate({"computeType": compute}), checkpoint)
    alone = token_losses(model, data.eval, unpacked(len(data.eval)))

    def difference(*, leak: bool) -> torch.Tensor:
        packed = token_losses(model, data.eval, data.eval_packs, leak=leak)
        a, b = (torch.cat([losses[row] for row in sorted(alone)]) for losses in (packed, alone))
        return (a - b).abs() / b.mean()

    separate = difference(leak=False)
    return Packing(separate.max().item(), separate.mean().item(), difference(leak=True).mean().item())


@dataclass(frozen=True)
class Variant:
    """A way to serve the adapter, beside the way it was trained."""

    name: str
    eval_loss: float
    largest: float
    """Absolute difference of a logit from that of the trained adapter on its quantized base."""
    mean: float


def merging(base: Path, adapter: Path, checkpoint: Path, rows: TokenizedRows, work: Path) -> list[Variant]:
    """Logits and loss of the adapter on its quantized base, and merged in two ways."""
    merge(base, adapter, work / "merged")
    dequantized = PeftModel.from_pretrained(load_base(base, QuantizationSpec(), CPU).dequantize(), str(adapter))
    makers = {
        "adapter on the NF4 base, as trained": lambda: trained(base, QuantizationSpec(), checkpoint),
        "adapter on the 16-bit base": lambda: trained(base, UNQUANTIZED, checkpoint),
        "merged into the 16-bit base (what is published)": lambda: load_base(work / "merged", UNQUANTIZED, CPU),
        "merged into the dequantized NF4 weights": dequantized.merge_and_unload,
    }
    variants: list[Variant] = []
    reference: list[torch.Tensor] = []
    for name, make in makers.items():
        logits, loss = logits_and_loss(make().eval(), rows)
        reference = reference or logits
        differences = torch.cat([(a - b).abs().flatten() for a, b in zip(logits, reference, strict=True)])
        variants.append(Variant(name, loss, differences.max().item(), differences.mean().item()))
        gc.collect()
    return variants


@torch.no_grad()
def logits_and_loss(model: Any, rows: TokenizedRows) -> tuple[list[torch.Tensor], float]:
    """Logits at every target of each row, and the mean loss over all targets."""
    found: list[torch.Tensor] = []
    total = 0.0
    for batch in eval_batches(rows, unpacked(len(rows)), 1, 1, 0):
        inputs, targets, labels = call_arguments(batch, CPU)
        logits = model(**inputs, use_cache=False).logits[0, targets].float()
        found.append(logits)
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
    return found, total / int(rows.target_counts.sum())
