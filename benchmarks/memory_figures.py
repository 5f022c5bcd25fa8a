"""The figures of docs/explanation/memory.md, from the formulas: ``python benchmarks/memory_figures.py``.

Writes each table between its marks in the page; with ``--check`` says whether the page has them, which a test asks.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_api.spec import LoRASpec, Optimizer, ParallelismSpec, QLoRAJobSpec, QuantizationSpec
from qlora_memory import (
    GPUS,
    AdapterShape,
    EstimateInput,
    MemoryEstimate,
    NoFit,
    PlanRequest,
    estimate,
    flop_per_token,
    gpu_of_device,
    model_shape,
    plan,
)
from qlora_memory.activations.attention import self_attention
from qlora_memory.activations.layers import LayerRecorder
from qlora_memory.activations.setting import ForwardSetting, Software
from qlora_memory.gpus import GIB
from qlora_memory.shape.model_shape import FeedForward, ModelShape

sys.path.append(str(Path(__file__).parent / "gpu"))
from memory_gpu_cases import change_of
from memory_gpu_cases import run_of as run_of_case

MEASURED = Path(__file__).parent / "measured" / "h200-memory.json"
"""Measurements of ``gpu/bench_memory_gpu.py``: for each case PyTorch's peak and the memory that the GPU had
allocated."""
PAGE = Path(__file__).parent.parent / "docs" / "explanation" / "memory.md"

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
MODELS: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": LLAMA_8B,
    "Llama-3.1-70B": {
        **LLAMA_8B,
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "intermediate_size": 28672,
    },
    "Mistral-7B": {**LLAMA_8B, "model_type": "mistral", "vocab_size": 32000, "max_position_embeddings": 32768},
    "Qwen3-8B": {
        **LLAMA_8B,
        "model_type": "qwen3",
        "num_hidden_layers": 36,
        "head_dim": 128,
        "intermediate_size": 12288,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
    },
    "Gemma-2-9B": {
        "model_type": "gemma2",
        "hidden_size": 3584,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "intermediate_size": 14336,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
    },
    "Mixtral-8x7B": {
        **LLAMA_8B,
        "model_type": "mixtral",
        "vocab_size": 32000,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
    },
}

# ------------------------------------------------------------------------------------------------------ published runs


@dataclass(frozen=True)
class PublishedRun:
    """A run that others measured, as inputs of our formulas."""

    sequences: int
    """Packs of 4,096 tokens in a micro-batch."""
    quantization: QuantizationSpec
    fused_adapter: bool
    measured: int
    """``torch.cuda.max_memory_allocated``, bytes."""

    @property
    def run(self) -> EstimateInput:
        """A100-80, rank 16 on q, k, v and o, dropout 0.1, AdamW, full checkpointing, one micro-batch an update.

        fms-acceleration's kernels: norm and rotation fused, checkpointing of the reentrant kind, Liger's fused loss,
        which cuts the sequence into 2ⁿ rows of logits, at least one for each ⌈vocabulary / hidden⌉ tokens.
        """
        tokens = 4096 * self.sequences
        rows = 1 << (-(-tokens // -(-128256 // 4096)) - 1).bit_length()
        return EstimateInput(
            shape=model_shape(LLAMA_8B),
            lora=LoRASpec(rank=16, dropout="0.1", target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
            quantization=self.quantization,
            optimizer=Optimizer.ADAMW,
            parallelism=ParallelismSpec(),
            world_size=1,
            rows=(4096,) * self.sequences,
            checkpointing=True,
            accumulates=False,
            software=Software(
                fused_norm=True,
                fused_rotation=True,
                fused_adapter=self.fused_adapter,
                peft=not self.fused_adapter,
                reentrant=True,
                logits_per_chunk=rows * 128256,
            ),
        )

    @property
    def predicted(self) -> int:
        return estimate(self.run, GPUS["a100-80gb"]).allocated_bytes


SOURCE = (
    "https://github.com/foundation-model-stack/fms-acceleration/blob/main/scripts/benchmarks/refs/a100_80gb_liger.csv"
)
_NF4, _WHOLE = QuantizationSpec(), QuantizationSpec(type="None")  # type: ignore[arg-type] # pydantic reads the name
POINTS = (
    PublishedRun(4, _NF4, fused_adapter=True, measured=14_411_297_792),
    PublishedRun(8, _NF4, fused_adapter=True, measured=22_936_744_960),
    PublishedRun(16, _NF4, fused_adapter=True, measured=39_987_639_296),
    PublishedRun(32, _NF4, fused_adapter=True, measured=74_089_427_968),
)
"""Rows ``accelerated-peft-bnb-foak-liger`` with one GPU. Their slope and offset are peers' 0.520 MB and 5.89 GB."""
HELD_OUT = (
    PublishedRun(4, _WHOLE, fused_adapter=False, measured=24_905_936_896),
    PublishedRun(8, _WHOLE, fused_adapter=False, measured=33_567_698_944),
    PublishedRun(16, _WHOLE, fused_adapter=False, measured=50_891_223_040),
)
"""Rows ``foak-fast-kernels-liger`` with LoRA and one GPU: a 16-bit base, PEFT's own adapter layers. Predicted once the
formulas stood, which were not changed for them."""


def published() -> Iterator[str]:
    yield "| base | packs of 4,096 | measured, GB | predicted, GB | error |"
    yield "|---|---|---|---|---|"
    for point in (*POINTS, *HELD_OUT):
        base = "NF4" if point.quantization.type == "NF4" else "16 bit"
        error = point.predicted / point.measured - 1
        yield (
            f"| {base} | {point.sequences} | {point.measured / 1e9:.3f} | {point.predicted / 1e9:.3f} | {error:+.2%} |"
        )


@dataclass(frozen=True)
class MeasuredCase:
    """One case of ``bench_memory_gpu.py``."""

    case: dict[str, Any]
    allocated: int
    in_use: int
    memory: MemoryEstimate
    """As it is predicted now."""

    @property
    def error(self) -> float:
        return self.memory.allocated_bytes / self.allocated - 1


SUPERSEDED = frozenset({"mixtral"})
"""Bases that were measured while the trainer left experts in 16 bits; they have not been measured since."""


def measured_cases() -> tuple[MeasuredCase, ...]:
    found = json.loads(MEASURED.read_text(encoding="utf-8"))
    gpu = gpu_of_device(found["gpu"], found["memory"])
    return tuple(
        MeasuredCase(row["case"], row["allocated"], row["inUse"], estimate(run_of_case(row["case"]), gpu))
        for row in found["cases"]
        if row["case"]["base"] not in SUPERSEDED
    )


def measured() -> Iterator[str]:
    """An 8B base, and of each other one its worst case."""
    worst: dict[str, MeasuredCase] = {}
    large: dict[str, MeasuredCase] = {}
    for row in measured_cases():
        base = row.case["base"]
        if base == "llama-8b":
            large[json.dumps(row.case)] = row
        elif base not in worst or abs(row.error) > abs(worst[base].error):
            worst[base] = row
    yield "| base | rows of | activations | | predicted, GB | measured, GB | error |"
    yield "|---|---|---|---|---|---|---|"
    for row in (*large.values(), *worst.values()):
        case, how = row.case, "recomputed" if row.case["recomputes"] else "kept"
        yield (
            f"| {case['base']} | {', '.join(f'{n:,}' for n in case['rows'])} | {how} | {change_of(case)} | "
            f"{row.memory.allocated_bytes / 1e9:.3f} | {row.allocated / 1e9:.3f} | {row.error:+.2%} |"
        )


# -------------------------------------------------------------------------------------------------- what a layer keeps


def kept() -> Iterator[str]:
    """Bytes a token of each part of a Llama-3-8B layer, with rank 16 on all linear layers, on a GPU."""
    shape = model_shape(LLAMA_8B)
    tokens = 1 << 14
    setting = ForwardSetting(AdapterShape(shape, LoRASpec()), QuantizationSpec(), (tokens,))
    layer = shape.layers[1]
    assert isinstance(layer.feed_forward, FeedForward)
    feed_forward = layer.feed_forward
    parts: dict[str, Callable[[LayerRecorder, Any], Any]] = {
        "norm": lambda recorder, x: recorder.norm(x),
        "q, k, v, attention, o": lambda recorder, x: self_attention(recorder, x, layer.attention),
        "gate, up, down": lambda recorder, x: recorder.feed_forward(x, feed_forward),
    }
    sizes = {}
    for name, write in parts.items():
        recorder = LayerRecorder(setting)
        write(recorder, recorder.value(shape.hidden, learns=True))
        sizes[name] = recorder.tape.saved() / tokens
    total = 2 * sizes["norm"] + sizes["q, k, v, attention, o"] + sizes["gate, up, down"]
    yield "| part | kept, bytes a token |"
    yield "|---|---|"
    for name, size in sizes.items():
        yield f"| {'each of two norms' if name == 'norm' else name} | {size:,.0f} |"
    yield f"| the layer | {total:,.0f} |"
    yield f"| the layer with checkpointing: its input | {2 * shape.hidden:,} |"


# --------------------------------------------------------------------------------------------------------------- plans


def job(length: int) -> QLoRAJobSpec:
    return QLoRAJobSpec.model_validate(
        {
            "model": {"source": "hf://org/base"},
            "dataset": {"train": {"source": "s3://bucket/rows"}, "format": "Text", "maxLength": length},
            "training": {"maxSteps": 1},
            "output": {"destination": "s3://bucket/out"},
        }
    )


def plans() -> Iterator[str]:
    """Defaults (NF4, rank 16, 16 sequences of 2,048 an update) on one GPU of several kinds."""
    names = ("rtx4090-24gb", "l40s-48gb", "a100-80gb", "h200-141gb")
    yield f"| | {' | '.join(names)} |"
    yield f"|---|{'---|' * len(names)}"
    for model, config in MODELS.items():
        shape = model_shape(config)
        yield f"| {model} | {' | '.join(_cell(shape, name) for name in names)} |"


def _cell(shape: ModelShape, name: str) -> str:
    outcome = plan(PlanRequest(job(2048), shape, GPUS[name], 1))
    if isinstance(outcome, NoFit):
        return f"needs {outcome.smallest.memory.needed_bytes / GIB:.1f}"
    how = "recomputed" if outcome.gradient_checkpointing else "kept"
    return f"{outcome.batch.micro_batch_size} × {how}, {outcome.memory.needed_bytes / GIB:.1f}"


def arithmetic() -> Iterator[str]:
    """GFLOP a token at rows of 4,096."""
    yield "| | kept | recomputed |"
    yield "|---|---|---|"
    for model, config in MODELS.items():
        shape = model_shape(config)
        adapter = AdapterShape(shape, LoRASpec())
        once, again = (flop_per_token(shape, adapter, 4096, recomputes=again) / 1e9 for again in (False, True))
        yield f"| {model} | {once:.1f} | {again:.1f} |"


# ---------------------------------------------------------------------------------------------------------------- page

TABLES: dict[str, Callable[[], Iterator[str]]] = {
    "measured": measured,
    "published": published,
    "kept": kept,
    "plans": plans,
    "arithmetic": arithmetic,
}


def filled(page: str) -> str:
    """The page with every table made anew."""
    for name, table in TABLES.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, rest = page.split(start)
        _, after = rest.split(end)
        page = before + start + "\n".join(table()) + "\n" + end + after
    return page


def main() -> int:
    page = PAGE.read_text(encoding="utf-8")
    new = filled(page)
    if "--check" in sys.argv[1:]:
        if new != page:
            print(f"{PAGE.name} is stale: python benchmarks/memory_figures.py")
        return int(new != page)
    PAGE.write_text(new, encoding="utf-8")
    print("\n\n".join("\n".join(table()) for table in TABLES.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
