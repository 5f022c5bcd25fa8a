"""Convert a configuration of axolotl."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qlora_cli.kube.errors import ClusterError
from qlora_cli.manifest.convert import trainer_arguments
from qlora_cli.manifest.convert.conversion import source_of

if TYPE_CHECKING:
    from qlora_cli.manifest.convert.conversion import Conversion

_NAMES = trainer_arguments.Names(
    micro_batch="micro_batch_size",
    micro_batch_default=1,
    epochs="num_epochs",
    epochs_default=1.0,
    schedule="lr_scheduler",
    schedule_default="cosine",
    optimizer="optimizer",
    fraction="val_set_size",
)
_LORA = trainer_arguments.LoraNames(
    rank="lora_r",
    rank_default=8,
    alpha_default=16,
    dropout_default=0.0,
    rank_stabilized="peft_use_rslora",
    dora="peft_use_dora",
)
_NOT_NEEDED = (
    *("model_type", "tokenizer_type", "is_llama_derived_model", "is_mistral_derived_model", "is_qwen_derived_model"),
    *("dataset_prepared_path", "eval_sample_packing", "sample_packing_bin_size", "sample_packing_group_size"),
    *("lora_fan_in_fan_out", "lora_model_dir", "eval_table_size", "eval_max_new_tokens", "save_first_step"),
    *("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "gptq", "shuffle_merged_datasets", "plugins"),
)


def convert(into: Conversion) -> None:
    """Convert all settings.

    Raises:
        ClusterError: the configuration trains something else than a LoRA adapter on rows.

    """
    if into.get("rl"):
        raise ClusterError(f"axolotl: rl: {into.get('rl')!r} learns from preferences; a QLoRAJob learns from rows")
    adapter = into.refuse_unless(("qlora", "lora"), "adapter", "none", "trains all weights, a QLoRAJob an adapter")
    into.not_needed(*_NOT_NEEDED)
    into.put("model.source", source_of(into.text("base_model"), into.text("revision_of_model")))
    _rows(into)
    _quantization(into, adapter)
    trainer_arguments.convert_lora(into, _LORA)
    _targets(into)
    trainer_arguments.convert(into, _NAMES)
    into.put("output.destination", into.text("output_dir", "./model-out"))


def _rows(into: Conversion) -> None:
    sources = into.get("datasets", [])
    if not isinstance(sources, list) or not sources or not all(isinstance(source, dict) for source in sources):
        raise ClusterError("axolotl: datasets: must be a list with at least one {path, type}")
    for left in sources[1:]:
        into.note(f"datasets: {left.get('path')}: a QLoRAJob has one source of rows; put the files into one folder")
    _source(into, sources[0])
    into.put("dataset.maxLength", int(into.number("sequence_len", 512)))
    into.put("dataset.packing", into.flag("sample_packing"))
    strategy = into.text("excess_length_strategy", "drop").lower()
    into.put("dataset.longRows", {"drop": "Drop", "truncate": "Truncate"}.get(strategy, "Fail"))
    if into.flag("train_on_inputs"):
        into.put("dataset.lossOn", "All")
    if jinja := into.text("chat_template_jinja"):
        into.put("dataset.chatTemplate", jinja)
    elif (template := into.text("chat_template", "tokenizer_default")) != "tokenizer_default":
        into.note(f"chat_template: {template}: the tokenizer's own is used; another one goes to dataset.chatTemplate")
    added = into.get("special_tokens", {})
    for name, token in (added if isinstance(added, dict) else {}).items():
        if name != "pad_token":  # rows are not padded
            into.note(f"special_tokens: {name}: {token}: has no counterpart, the tokenizer is used as it is")


def _source(into: Conversion, source: dict[str, Any]) -> None:
    place = source_of(str(source.get("path") or ""), str(source.get("revision") or ""))
    files = source.get("data_files")
    if isinstance(files, str) and place.startswith("hf://"):
        place = f"{place}/{files}"
    elif files:
        into.note(f"datasets: data_files: {files}: all files of {place} are read")
    into.put("dataset.train.source", place)
    if (split := source.get("split") or "train") != "train":
        into.note(f"datasets: split: {split}: has no counterpart, training rows are those of train")
    _format(into, source)


def _format(into: Conversion, source: dict[str, Any]) -> None:
    form = source.get("type")
    kind = "custom" if isinstance(form, dict) else str(form or "").partition(".")[0].partition(":")[0]
    match kind:
        case "chat_template" | "sharegpt":
            into.put("dataset.format", "Messages")
            default = "conversations" if kind == "sharegpt" else "messages"
            into.put("dataset.columns.messages", source.get("field_messages") or default)
        case "completion":
            into.put("dataset.format", "Text")
            into.put("dataset.columns.text", source.get("field") or "text")
        case "alpaca" | "custom":
            into.put("dataset.format", "Instruction")
            columns = form if isinstance(form, dict) else source
            for name in ("instruction", "input", "output"):
                into.put(f"dataset.columns.{name}", columns.get(f"field_{name}") or name)
            if isinstance(form, dict) and (text := form.get("format")):
                into.note(f"datasets: format: {str(text)!r}: prompts are written as for Instruction (docs/guides)")
        case _:
            raise ClusterError(
                f"axolotl: datasets: type: {form!r} has no counterpart; known are alpaca, chat_template, sharegpt, "
                "completion and fields of one's own"
            )


def _quantization(into: Conversion, adapter: str) -> None:
    four, eight = into.flag("load_in_4bit", adapter == "qlora"), into.flag("load_in_8bit")
    given = into.get("bnb_config_kwargs", {})
    given = given if isinstance(given, dict) else {}
    kind, double = str(given.get("bnb_4bit_quant_type", "nf4")), bool(given.get("bnb_4bit_use_double_quant", True))
    trainer_arguments.put_quantization(into, 4 if four else 8 * eight, kind, double=double)


def _targets(into: Conversion) -> None:
    targets = into.names("lora_target_modules")
    if not into.flag("lora_target_linear") and targets and targets != ["all-linear"]:
        into.put("lora.targetModules", targets)
