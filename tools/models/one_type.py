"""Take one model type through all that a job does, with the trainer's own functions, and measure it."""

from __future__ import annotations

import json
import os
import resource
import secrets
import tempfile
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file

from models.page import REFUSED, SUCCEEDED
from models.tiny_base import auto_class, write_base
from qlora_api import QLoRAJobSpec
from qlora_api.batch import split_batch
from qlora_api.contract import JobRef, TrainerConfig
from qlora_api.spec import ComputeType, QuantizationSpec, QuantizationType
from qlora_api.status import MemoryComponent
from qlora_cli.memory_plan.plan_job import PlanOptions, answer
from qlora_trainer.errors import AdapterRejectedError, TrainerError, UserError
from qlora_trainer.model.base_model import add_lora, load_base, trainable, weight_bytes
from qlora_trainer.model.device.attention import is_packed
from qlora_trainer.model.loss import NextTokenLoss, call_arguments, end_to_end, head_is_plain, rows_are_apart
from qlora_trainer.prepare.command import prepare
from qlora_trainer.prepare.plan_memory import predicted
from qlora_trainer.prepare.records import Records
from qlora_trainer.reporting.rank_exit import LastSeen, quiet_libraries
from qlora_trainer.training.train import train
from testing.ports import free_port

CPU = torch.device("cpu")
EXACT = QuantizationSpec(type=QuantizationType.NONE, compute_type=ComputeType.FLOAT32)
NF4 = QuantizationSpec(compute_type=ComputeType.FLOAT32)
WEIGHTS = (
    MemoryComponent.QUANTIZED_WEIGHTS,
    MemoryComponent.QUANTIZATION_CONSTANTS,
    MemoryComponent.UNQUANTIZED_WEIGHTS,
)
NO_TOY = "No toy"
GATE, LATE, CRASHED, WRONG = (
    "Ended at the gate",
    "Refused after Prepare",
    "Crashed",
    "Wrong",
)
PLANNED, ROUNDED, MERGED = 1e-3, 1e-3, 1e-2
"""Largest share by which bytes differ from the plan; largest distance of logits, as a share of their size, of the model
that PEFT reloads from the trained one, and of the merged one from what PEFT merges and rounds to bf16."""
APART_NATS = 2e-3
"""Largest difference of a token's loss in a pack from that of its row alone, in fp32."""
BYTES = 8 << 30
"""Limit of the data segment of the process that tests one model type."""
LEARNED = 1e-2
"""Least distance of the trained model's logits from the base's: with less a comparison of them would show nothing."""


@dataclass
class TypeResult:
    """All that is known of a type."""

    type: str
    outcome: str
    where: str = ""
    sentence: str = ""
    measured: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def run_type(model_type: str, tokenizer: str, rows: str, out: str) -> None:
    """Try one type in this process, within bounds of memory; its result goes to a file, its words to another."""
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.nice(5)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="toy-") as folder:
        result = try_type(model_type, Path(folder), Path(tokenizer), Path(rows))
    Path(out).write_text(result.to_json())
    os._exit(0)  # threads of gloo do not hold it up


def try_type(model_type: str, folder: Path, tokenizer: Path, rows: Path) -> TypeResult:
    """Write a toy, plan it, prepare it, train it for two steps, publish it, merge it, load it again and compare."""
    quiet_libraries()
    base = folder / "base"
    try:
        write_base(model_type, base, tokenizer)
    except Exception as error:  # noqa: BLE001 what each class raises
        return TypeResult(model_type, NO_TOY, "toy", _sentence(error))
    config = job_config(base, folder, rows)
    planned = plan_sentence(config, folder)
    try:
        prepare(config)
    except UserError as error:
        return TypeResult(
            model_type, REFUSED, "Prepare", _sentence(error).replace(str(base), "the base"), {"plan": planned}
        )
    except Exception as error:  # noqa: BLE001
        return TypeResult(model_type, CRASHED, "Prepare", _trace(error))
    try:
        message = train(config, LastSeen())
    except AdapterRejectedError as error:
        return TypeResult(model_type, GATE, "train", _sentence(error))
    except TrainerError as error:
        return TypeResult(model_type, LATE, "train", _sentence(error))
    except Exception as error:  # noqa: BLE001
        return TypeResult(model_type, CRASHED, "train", _trace(error))
    try:
        assert message.adapter is not None
        measured = measure(model_type, config, Path(message.adapter.uri))
    except Exception as error:  # noqa: BLE001
        return TypeResult(model_type, CRASHED, "measure", _trace(error))
    measured["plan"] = planned
    wrong = "; ".join(faults(measured))
    return TypeResult(model_type, WRONG if wrong else SUCCEEDED, "measure" if wrong else "", wrong, measured)


def job_config(base: Path, folder: Path, rows: Path) -> TrainerConfig:
    spec = {
        "model": {"source": str(base)},
        "dataset": {"train": {"source": str(rows)}, "format": "PromptCompletion", "maxLength": 128, "longRows": "Drop"},
        "quantization": {"computeType": "BFloat16"},
        "lora": {"rank": 4, "alpha": 8},
        "training": {"maxSteps": 2, "globalBatchSize": 2, "microBatchSize": 1, "learningRate": "2e-2"},
        "output": {"destination": str(folder / "out"), "merge": "BFloat16"},
    }
    (folder / "key").write_text(secrets.token_hex(32))
    (folder / "job.yaml").write_text(
        json.dumps({"apiVersion": "qlora.dev/v1alpha1", "kind": "QLoRAJob", "metadata": {"name": "toy"}, "spec": spec})
    )
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    parsed = QLoRAJobSpec.model_validate(spec)
    return TrainerConfig(
        job=JobRef(name="toy", uid="0a1b2c3d-toy"),
        spec=parsed,
        attempt=1,
        batch=split_batch(parsed, 1),
        device="CPU",
        ranks_per_worker=1,
        key_file=str(folder / "key"),
        gradient_checkpointing=False,
        checkpoint_uri=str(folder / "checkpoints"),
        cache_dir=str(folder / "cache"),
        termination_message_path=str(folder / "termination.json"),
        metrics_port=0,
        metrics_host="127.0.0.1",
    )


def plan_sentence(config: TrainerConfig, folder: Path) -> str:
    """Return why ``qlora plan`` refuses the job; nothing where it plans it."""
    try:
        answer(folder / "job.yaml", PlanOptions(gpu="h100-80gb"))
    except ValueError as error:
        return _sentence(error).replace(config.spec.model.source, "the base")
    except Exception as error:  # noqa: BLE001
        return f"crashed: {_trace(error)}"
    return ""


# ------------------------------------------------------------------------------------------------------------ measured


def measure(model_type: str, config: TrainerConfig, adapter: Path) -> dict[str, Any]:
    """Compare a published adapter and what was planned with the trainer's model."""
    base, lora = Path(config.spec.model.source), config.spec.lora
    quantized = add_lora(load_base(base, config.spec.quantization, CPU), lora, seed=1)
    found = bytes_beside_plan(config, weight_bytes(quantized))
    del quantized
    tensors = load_file(adapter / "adapter_model.safetensors")
    trained = with_adapter(add_lora(load_base(base, NF4, CPU), lora, seed=1), tensors)
    found |= rows_and_gradients(trained)
    del trained
    exact = add_lora(load_base(base, EXACT, CPU), lora, seed=1).eval()
    untrained = logits(exact)
    own = logits(with_adapter(exact, tensors))
    del exact
    plain = auto_class(model_type).from_pretrained(base, dtype=torch.float32)
    peft = PeftModel.from_pretrained(plain, adapter).eval()
    reloaded = logits(peft)
    rounded = logits(rounded_to_bf16(peft.merge_and_unload()))
    merged = auto_class(model_type).from_pretrained(adapter.with_name("merged"), dtype=torch.float32)
    return found | {
        "effect": distance(untrained, own),
        "reload": distance(reloaded, own),
        "merge": distance(logits(merged.eval()), rounded),
    }


def bytes_beside_plan(config: TrainerConfig, measured: dict[str, int]) -> dict[str, Any]:
    record = Records(config).of_run()
    if record is None or record.shape is None:
        return {"weights": None, "adapter": None}
    planned = predicted(config, record.shape, (config.spec.dataset.max_length,))

    def share(*names: MemoryComponent) -> float:
        there = sum(measured.get(str(name), 0) for name in names)
        return sum(planned.get(str(name), 0) for name in names) / there - 1 if there else 0.0

    return {"weights": share(*WEIGHTS), "adapter": share(MemoryComponent.ADAPTER_WEIGHTS)}


def rows_and_gradients(model: Any) -> dict[str, Any]:
    """Compare a pack of three rows with each alone, and count the adapter's tensors that learn nothing."""
    module = NextTokenLoss(model, fused=head_is_plain(model)).eval()
    module.row_by_row = not rows_are_apart(module, CPU)
    rows = [torch.arange(n) * step % 251 for n, step in ((24, 7), (9, 5), (31, 11))]
    with torch.no_grad():
        together = module(*call_arguments(end_to_end(rows), CPU))
        alone = torch.cat([module(*call_arguments(end_to_end([row]), CPU)) for row in rows])
    module.train()
    module(*call_arguments(end_to_end(rows), CPU)).mean().backward()
    learning = trainable(model)
    return {
        "rowByRow": module.row_by_row,
        "apart": float((together - alone).abs().max()),
        "tensors": len(learning),
        "idle": sorted(name for name, p in learning.items() if p.grad is None or not p.grad.any()),
    }


def with_adapter(model: Any, tensors: dict[str, torch.Tensor]) -> Any:
    learning = {name.replace(".default", ""): parameter for name, parameter in trainable(model).items()}
    if missing := learning.keys() ^ tensors.keys():
        raise AssertionError(f"the published adapter and the trained one differ in {sorted(missing)[:3]}")
    for name, parameter in learning.items():
        parameter.data.copy_(tensors[name])
    return model


@torch.no_grad()
def rounded_to_bf16(model: Any) -> Any:
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Return the logits of one row, [T, vocabulary], by the model's own forward pass."""
    (inputs, _, _) = call_arguments(end_to_end([torch.arange(30) * 7 % 251]), CPU)
    asked = inputs if is_packed(model.config) else {"input_ids": inputs["input_ids"]}
    found: torch.Tensor = model(**asked, use_cache=False).logits[0].float()
    return found


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return how far logits are apart, as a share of their deviation: of the median token.

    Rounding sends a few tokens to other experts, and those are far apart.
    """
    return float((found - wanted).abs().mean(-1).median() / wanted.std().clamp_min(1e-9))


def faults(measured: dict[str, Any]) -> list[str]:
    """Say which bars are missed."""
    found = [
        f"{name} of the plan are {1 + share:.4f} of the measured" if share is not None else f"{name} are not planned"
        for name in ("weights", "adapter")
        if (share := measured[name]) is None or abs(share) > PLANNED
    ]
    if not measured["apart"] <= APART_NATS:
        found.append(f"a token's loss in a pack differs by {measured['apart']:.3g}")
    if measured["idle"]:
        found.append(f"{len(measured['idle'])} tensors learn nothing: {measured['idle'][0]}")
    if not measured["effect"] >= LEARNED:
        found.append(f"two steps change logits by {measured['effect']:.2g} of their size alone")
    for name, bound in (("reload", ROUNDED), ("merge", MERGED)):
        if not measured[name] <= bound:
            found.append(f"{name} gives logits that differ by {measured[name]:.3g} (effect {measured['effect']:.3g})")
    return found


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split())[:600] or type(error).__name__


def _trace(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-3:]
    places = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(last))
    return f"{type(error).__name__}: {_sentence(error)} [{places}]"
