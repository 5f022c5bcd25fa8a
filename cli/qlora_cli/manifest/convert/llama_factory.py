"""Convert a configuration of LLaMA-Factory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_cli.kube.errors import ClusterError
from qlora_cli.manifest.convert import trainer_arguments
from qlora_cli.manifest.convert.conversion import source_of

if TYPE_CHECKING:
    from qlora_cli.manifest.convert.conversion import Conversion

_NAMES = trainer_arguments.Names(fraction="val_size")
_LORA = trainer_arguments.LoraNames(rank="lora_rank", rank_default=8, alpha_default=None, dropout_default=0.0)
_NOT_NEEDED = ("trust_remote_code", "mix_strategy", "preprocessing_batch_size", "use_unsloth", "enable_liger_kernel")
_NO_ROWS = "; name the rows by --data"


def convert(into: Conversion, folder: Path) -> None:
    """Convert all settings.

    Args:
        into: has the settings.
        folder: of the configuration; ``dataset_dir`` is below it, or below the working directory.

    Raises:
        ClusterError: the configuration trains something else than a LoRA adapter on rows.

    """
    stage = into.refuse_unless(("sft", "pt"), "stage", "sft", "is another method; a QLoRAJob learns from rows")
    why = "trains other weights than an adapter's"
    into.refuse_unless(("lora",), "finetuning_type", "lora", why)
    into.not_needed(*_NOT_NEEDED)
    into.put("model.source", source_of(into.text("model_name_or_path"), into.text("model_revision")))
    _rows(into, stage, folder)
    _quantization(into)
    trainer_arguments.convert_lora(into, _LORA)
    if (targets := into.names("lora_target") or ["all"]) != ["all"]:
        into.put("lora.targetModules", targets)
    trainer_arguments.convert(into, _NAMES)
    into.put("output.destination", into.text("output_dir", "./saves"))


def _rows(into: Conversion, stage: str, folder: Path) -> None:
    names = into.names("dataset")
    described = _descriptions(into, folder)
    for left in names[1:]:
        into.note(f"dataset: {left}: a QLoRAJob has one source of rows; put the files into one folder")
    if names:
        _source(into, names[0], described.get(names[0]), stage)
    into.put("dataset.maxLength", int(into.number("cutoff_len", 2048)))
    into.put("dataset.longRows", "Truncate")
    packing = into.flag("packing", stage == "pt")
    into.put("dataset.packing", packing)
    if packing and not into.flag("neat_packing"):
        into.note("packing: rows of one pack do not see each other here, as with neat_packing")
    if into.flag("train_on_prompt"):
        into.put("dataset.lossOn", "All")
    if template := into.text("template"):
        into.note(f"template: {template}: the tokenizer's own is used; another one goes to dataset.chatTemplate")


def _descriptions(into: Conversion, folder: Path) -> dict[str, Any]:
    """Read dataset_info.json; empty where there is none."""
    given = Path(into.text("dataset_dir", "data"))
    for place in (given, folder / given):
        try:
            found = json.loads((place / "dataset_info.json").read_text(encoding="utf-8"))
        except OSError:
            continue
        except ValueError as error:
            raise ClusterError(f"LLaMA-Factory: {place / 'dataset_info.json'}: no JSON: {error}") from None
        return {
            name: {**entry, "dir": str(place)}
            for name, entry in (found.items() if isinstance(found, dict) else ())
            if isinstance(entry, dict)
        }
    return {}


def _source(into: Conversion, name: str, described: dict[str, Any] | None, stage: str) -> None:
    if described is None:
        into.note(f"dataset: {name}: is described in LLaMA-Factory's dataset_info.json, which is not here{_NO_ROWS}")
        return
    if repository := described.get("hf_hub_url"):
        into.put("dataset.train.source", source_of(str(repository)))
    elif file := described.get("file_name"):
        into.put("dataset.train.source", str(Path(described["dir"]) / str(file)))
    else:
        into.note(f"dataset: {name}: has no hf_hub_url and no file_name{_NO_ROWS}")
    for key in ("subset", "split", "num_samples", "folder"):
        if described.get(key):
            into.note(f"dataset: {name}: {key}: {described[key]}: has no counterpart")
    columns = described.get("columns") or {}
    columns = dict(columns) if isinstance(columns, dict) else {}
    if stage == "pt":
        into.put("dataset.format", "Text")
        into.put("dataset.columns.text", columns.get("prompt") or "text")
        return
    if described.get("formatting", "alpaca") == "sharegpt":
        into.put("dataset.format", "Messages")
        into.put("dataset.columns.messages", columns.get("messages") or "conversations")
        into.put("dataset.columns.tools", columns.get("tools") or "tools")
        into.put("dataset.columns.system", columns.pop("system", None) or "system")
    else:
        into.put("dataset.format", "Instruction")
        for ours, theirs in (("instruction", "prompt"), ("input", "query"), ("output", "response")):
            into.put(f"dataset.columns.{ours}", columns.get(theirs) or ours)
    for key in ("system", "history", "images", "videos", "audios"):
        if columns.get(key):
            into.note(f"dataset: {name}: columns: {key}: {columns[key]}: has no counterpart")


def _quantization(into: Conversion) -> None:
    bits, method = int(into.number("quantization_bit", 0)), into.text("quantization_method", "bnb").lower()
    if bits not in (0, 4, 8) or (bits and method not in ("bnb", "bitsandbytes")):
        into.note(f"quantization: {bits} bits by {method}: has no counterpart, NF4 is set")
        bits = 4
    kind, double = into.text("quantization_type", "nf4"), into.flag("double_quantization", default=True)
    trainer_arguments.put_quantization(into, bits, kind, double=double)
