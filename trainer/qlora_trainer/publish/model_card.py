"""The model card: README.md beside the adapter, for people and for the Hub."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from qlora_api.spec import LoRABias, QLoRAJobSpec, QuantizationType
from qlora_api.untrusted.printable import printable

if TYPE_CHECKING:
    from qlora_api.contract import JobRef
    from qlora_api.status import TaskResult
    from qlora_trainer.publish.adapter_manifest import PublishFacts

SHOWN_TOKENS = 16
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values vLLM takes for --max-lora-rank (vllm/config/lora.py, MaxLoRARanks)."""


def model_card(job: JobRef, attempt: int, facts: PublishFacts) -> str:
    """Write the card. It depends on its arguments alone: an attempt that publishes twice writes the same bytes.

    The license is left out: it follows from the base's license and from the rows, which only the owner knows.
    """
    base = base_name(facts.spec.model.source)
    front = [
        "---",
        f"base_model: {json.dumps(base)}",
        "base_model_relation: adapter",
        "library_name: peft",
        "pipeline_tag: text-generation",
        "tags:",
        "- lora",
        "- qlora",
        "---",
    ]
    rows = "\n".join(f"| {name} | {value} |" for name, value in summary(job, attempt, facts))
    return "\n".join(
        [
            *front,
            "",
            f"# {job.name}",
            "",
            f"A LoRA adapter for `{base}`, trained with the base {_held_as(facts.spec)}.",
            "",
            "## Training",
            "",
            "| | |",
            "| --- | --- |",
            rows,
            "",
            "## Loading with PEFT",
            "",
            "```python",
            *_peft_lines(facts, base),
            "```",
            "",
            "## Serving with vLLM",
            "",
            *_vllm_lines(job, facts, base),
            "",
        ]
    )


def base_name(source: str) -> str:
    """Name the base as ``from_pretrained`` knows it: ``org/name`` for the Hub, else the source as it is."""
    return source.removeprefix("hf://").partition("@")[0] if source.startswith("hf://") else source


def summary(job: JobRef, attempt: int, facts: PublishFacts) -> list[tuple[str, str]]:
    """List the training in pairs of a name and a value, in the order of a manifest."""
    spec = facts.spec
    lora, training = spec.lora, spec.training
    targets = ", ".join(lora.target_modules) if lora.target_modules else "all linear layers but the head, and experts"
    variants = [name for name, on in (("rank-stabilized", lora.rank_stabilized), ("DoRA", lora.dora)) if on]
    return [
        ("Base", f"`{spec.model.source}`"),
        ("Base revision", f"`{facts.base_revision}`"),
        ("Base held as", ": ".join(filter(None, (_held_as(spec), facts.quantized)))),
        ("Training rows", f"`{spec.dataset.train.source}` ({spec.dataset.format})"),
        ("Loss on", str(spec.dataset.effective_loss_on)),
        ("Longest sequence", f"{spec.dataset.max_length} tokens{', packed' if spec.dataset.packing else ''}"),
        ("LoRA", f"rank {lora.rank}, alpha {lora.alpha}, dropout {lora.dropout}{''.join(f', {v}' for v in variants)}"),
        ("Adapted layers", ": ".join(filter(None, (targets, facts.adapted)))),
        *([("Trained tokens", _in_a_cell(lora.train_tokens))] if lora.train_tokens else []),
        ("Optimizer", f"{training.optimizer}, weight decay {training.weight_decay}"),
        ("Learning rate", f"{training.learning_rate}, {training.schedule}, {training.warmup_steps} warmup steps"),
        ("Global batch", f"{training.global_batch_size} sequences"),
        ("Steps", f"{facts.step} published of {facts.total_steps}"),
        ("Tokens", f"{facts.tokens:,}"),
        ("Eval loss", f"{_loss(facts.base_eval_loss)} → {_loss(facts.eval_loss)}"),
        *((f"{task.name} ({task.metric})", _reached(task)) for task in facts.tasks),
        ("Seed", str(training.seed)),
        ("Run", f"`{job.namespace}/{job.name}` `{job.uid}`, attempt {attempt}"),
    ]


def _held_as(spec: QLoRAJobSpec) -> str:
    quantization = spec.quantization
    if quantization.type is QuantizationType.NONE:
        return "in 16 bits"
    double = quantization.double_quantization and quantization.type.is_four_bit
    skipped = f" but for {', '.join(quantization.skip_modules)}" if quantization.skip_modules else ""
    return f"in {quantization.type}{', double-quantized' if double else ''}{skipped}"


def _in_a_cell(tokens: list[str]) -> str:
    """Write tokens for a cell of a table: as code, without what would end one or the other."""
    shown = [printable(json.dumps(token, ensure_ascii=False)) for token in tokens[:SHOWN_TOKENS]]
    named = [f"``{text}``".replace("|", "\\|") for text in shown]
    return ", ".join([*named, *([f"and {len(tokens) - SHOWN_TOKENS} more"] if len(tokens) > SHOWN_TOKENS else [])])


def _loss(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def _reached(task: TaskResult) -> str:
    error = f" ± {task.standard_error}" if task.standard_error else ""
    return f"{task.base or 'not measured'} → {task.adapter}{error}, {task.examples:,} examples"


def _peft_lines(facts: PublishFacts, base: str) -> list[str]:
    revision = f', revision="{facts.base_revision}"' if facts.spec.model.source.startswith("hf://") else ""
    return [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'adapter = "./adapter"  # this folder',
        f'base = AutoModelForCausalLM.from_pretrained({json.dumps(base)}{revision}, dtype="auto", device_map="auto")',
        "model = PeftModel.from_pretrained(base, adapter)",
        "tokenizer = AutoTokenizer.from_pretrained(adapter)",
    ]


def _vllm_lines(job: JobRef, facts: PublishFacts, base: str) -> list[str]:
    lora = facts.spec.lora
    rank = next((r for r in VLLM_RANKS if r >= lora.rank), None)
    reasons = [
        reason
        for reason, holds in (
            ("it uses DoRA", lora.dora),
            ("it has trained biases", lora.bias is not LoRABias.NONE),
            ("it adapts experts", facts.adapts_experts),
            ("it has trained embeddings of tokens", bool(lora.train_tokens)),
            (f"its rank {lora.rank} is above {VLLM_RANKS[-1]}", rank is None),
        )
        if holds
    ]
    if reasons:
        cause = " and ".join(reasons)
        merge = "Merge it into its base (`spec.output.merge: BFloat16`) and serve the merged model."
        return [f"vLLM does not serve this adapter by itself, since {cause}. {merge}"]
    return [
        "```sh",
        f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {job.name}=./adapter",
        "```",
    ]
