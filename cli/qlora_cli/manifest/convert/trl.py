"""Convert arguments of TRL's SFT script: a command line, or the YAML file of its ``--config``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_cli.kube.errors import ClusterError
from qlora_cli.manifest.convert import trainer_arguments
from qlora_cli.manifest.convert.conversion import source_of

if TYPE_CHECKING:
    from qlora_cli.manifest.convert.conversion import Conversion

_NAMES = trainer_arguments.Names(learning_rate_default=2e-5)
_LORA = trainer_arguments.LoraNames(rank="lora_r", rank_default=16, alpha_default=32, dropout_default=0.05)
_NOT_NEEDED = (
    *("lora_task_type", "trust_remote_code", "push_to_hub", "bnb_4bit_quant_storage", "use_liger_kernel"),
    *("packing_strategy", "eval_packing", "padding_free", "dataset_train_split", "config"),
)


def convert(into: Conversion) -> None:
    """Convert all settings.

    Raises:
        ClusterError: the arguments train all weights.

    """
    if not into.flag("use_peft"):
        raise ClusterError("TRL: use_peft: is not set, which trains all weights; a QLoRAJob trains an adapter")
    into.not_needed(*_NOT_NEEDED)
    processes = int(into.number("num_processes", 1))  # an option of 'accelerate launch' in front of the script's
    into.gpus = processes if into.gpus == 1 else into.gpus
    into.put("model.source", source_of(into.text("model_name_or_path"), into.text("model_revision")))
    _rows(into)
    bits = 4 if into.flag("load_in_4bit") else 8 * into.flag("load_in_8bit")
    kind, double = into.text("bnb_4bit_quant_type", "nf4"), into.flag("use_bnb_nested_quant")
    trainer_arguments.put_quantization(into, bits, kind, double=double)
    trainer_arguments.convert_lora(into, _LORA)
    targets = into.names("lora_target_modules")
    if not targets:
        into.note("lora_target_modules: PEFT would choose some by the architecture; here all linear layers are adapted")
    elif targets != ["all-linear"]:
        into.put("lora.targetModules", targets)
    trainer_arguments.convert(into, _NAMES)
    into.put("output.destination", into.text("output_dir", "./trainer_output"))


def _rows(into: Conversion) -> None:
    if name := into.text("dataset_name"):
        into.put("dataset.train.source", source_of(name))
    if part := into.text("dataset_config"):
        into.note(f"dataset_config: {part}: has no counterpart; name the folder or file in dataset.train.source")
    if into.text("eval_strategy", "no").lower() != "no":
        into.note(f"evaluation rows are those of split {into.text('dataset_test_split', 'test')}: set dataset.eval")
    if (column := into.text("dataset_text_field", "text")) != "text":
        into.put("dataset.columns.text", column)
    into.put("dataset.maxLength", int(into.number("max_length", into.number("max_seq_length", 1024))))
    into.put("dataset.longRows", "Truncate")
    into.put("dataset.packing", into.flag("packing"))
    if into.get("completion_only_loss") is not None and not into.flag("completion_only_loss"):
        into.put("dataset.lossOn", "All")
    if into.flag("assistant_only_loss"):
        into.put("dataset.format", "Messages")
    else:
        into.note(
            "assistant_only_loss: is not set: TRL then learns every token of a conversation; here only what the "
            "assistant says, unless dataset.lossOn is All"
        )
    if template := into.text("chat_template_path"):
        _template(into, template)
    if token := into.text("eos_token"):
        into.note(f"eos_token: {token}: the end token is found in the chat template")


def _template(into: Conversion, place: str) -> None:
    try:
        into.put("dataset.chatTemplate", Path(place).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        into.note(f"chat_template_path: {place}: is no file here; its text goes to dataset.chatTemplate")


def arguments_of(text: str) -> dict[str, Any]:
    """Read a command line: the options of the script and of what launches it; other words are programs.

    Raises:
        ClusterError: quotes do not match.

    """
    try:
        words = shlex.split(text.replace("\\\n", " "), comments=True)
    except ValueError as error:
        raise ClusterError(f"TRL: no command line: {error}") from None
    settings: dict[str, Any] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, given, value = word.removeprefix("--").partition("=")
            name = name.replace("-", "_")
            settings[name] = value if given else True
        elif word.endswith(".py"):
            name = ""  # the script, after its launcher's options
        elif name:
            before = settings[name]
            settings[name] = word if before is True else [*(before if isinstance(before, list) else [before]), word]
    return settings
