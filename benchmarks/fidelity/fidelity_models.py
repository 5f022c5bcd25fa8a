"""Measure models in this process for ``fidelity.py``: quantization error, packing, merging."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.utils.integrations import dequantize_bnb_weight
from safetensors.torch import load_file

from qlora_api.spec import ComputeType, LoRASpec, QuantizationSpec, QuantizationType
from qlora_api.status import MemoryComponent
from qlora_trainer.checkpoint import engine_state
from qlora_trainer.data.batches import eval_batches
from qlora_trainer.data.packing import unpacked
from qlora_trainer.inspection.loading import measure_base
from qlora_trainer.model.base_model import add_lora, load_base, weight_bytes
from qlora_trainer.model.experts.targets import linear_layers
from qlora_trainer.model.loss import NextTokenLoss, call_arguments
from qlora_trainer.prepare.plan_memory import predicted, shape_of
from qlora_trainer.publish.merge_adapter import merge

if TYPE_CHECKING:
    from qlora_api.contract import TrainerConfig
    from qlora_trainer.data.packing import Sequences
    from qlora_trainer.data.tokenized_rows import TokenizedRows
    from qlora_trainer.prepare.tokenize_rows import PreparedData

CPU = torch.device("cpu")
WEIGHTS = (
    str(MemoryComponent.QUANTIZED_WEIGHTS),
    str(MemoryComponent.QUANTIZATION_CONSTANTS),
    str(MemoryComponent.UNQUANTIZED_WEIGHTS),
)
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


def worst_layers(base: Path, count: int) -> list[str]:
    """Names of the layers with the largest error of NF4 with double quantization, as ``qlora inspect`` measures it."""
    found: list[dict[str, Any]] = []
    measure_base(base, CPU, found.append)
    layers = [value for value in found if "errors" in value]
    layers.sort(key=lambda value: value["errors"]["NF4+DQ"]["64"], reverse=True)
    return [value["name"] for value in layers[:count]]


def quantized_share(config: TrainerConfig) -> float:
    """Share of the base's weights that are held in 4 bits, by the tensors that are loaded."""
    model = load_base(Path(config.spec.model.source), config.spec.quantization, CPU)
    packed = sum(2 * p.numel() for p in model.parameters() if hasattr(p, "quant_state"))
    return packed / (packed + sum(p.numel() for p in model.parameters() if not hasattr(p, "quant_state")))


def weight_bytes_planned_and_loaded(config: TrainerConfig) -> tuple[int, int]:
    """Bytes of the base's weights and their constants: by the plan, and of the tensors that are loaded in bfloat16."""
    base = Path(config.spec.model.source)
    shape = shape_of(base)
    assert shape is not None
    in_bf16 = config.spec.quantization.model_copy(update={"compute_type": ComputeType.BFLOAT16})
    config = config.model_copy(update={"spec": config.spec.model_copy(update={"quantization": in_bf16})})
    planned = predicted(config, shape, (config.spec.dataset.max_length,))
    loaded = weight_bytes(load_base(base, config.spec.quantization, CPU).requires_grad_(requires_grad=False))
    return sum(planned.get(name, 0) for name in WEIGHTS), sum(loaded.get(name, 0) for name in WEIGHTS)


def divergences(configs: list[TrainerConfig], rows: TokenizedRows) -> list[float]:
    """Mean divergence (Kullback-Leibler, nats) of the next token's distribution from the first base's, by base."""
    exact: list[torch.Tensor] = []
    found: list[float] = []
    for config in configs:
        model = load_base(Path(config.spec.model.source), config.spec.quantization, CPU).eval()
        own = [logits.log_softmax(-1) for logits in logits_and_loss(model, rows)[0]]
        exact = exact or own
        each = [(one.exp() * (one - other)).sum(-1) for one, other in zip(exact, own, strict=True)]
        found.append(torch.cat(each).mean().item())
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
    """Mean difference if rows could attend to each other, for comparison."""


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
