"""Read a configuration, find out whose it is, and convert it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from qlora_cli.kube.errors import ClusterError
from qlora_cli.manifest.convert import axolotl, llama_factory, trl
from qlora_cli.manifest.convert.conversion import Conversion

if TYPE_CHECKING:
    from pathlib import Path

_LARGEST_BYTES = 1 << 20
_LLAMA_FACTORY = {"stage", "finetuning_type", "lora_rank", "lora_target", "cutoff_len", "template", "dataset_dir"}
_TRL = {"use_peft", "lora_r", "dataset_name", "lora_target_modules", "load_in_4bit", "max_length", "max_seq_length"}


def convert(file: Path, gpus: int) -> Conversion:
    """Convert a configuration of axolotl, of LLaMA-Factory, or of TRL (YAML, or the arguments of a command line).

    Raises:
        ClusterError: it cannot be read, is none of the three, or trains something else than a LoRA adapter on rows.

    """
    settings = _settings(file)
    if "base_model" in settings:
        into = Conversion("axolotl", settings, gpus)
        axolotl.convert(into)
    elif "model_name_or_path" in settings and settings.keys() & _LLAMA_FACTORY:
        into = Conversion("LLaMA-Factory", settings, gpus)
        llama_factory.convert(into, file.parent)
    elif "model_name_or_path" in settings and settings.keys() & _TRL:
        into = Conversion("TRL", settings, gpus)
        trl.convert(into)
    else:
        raise ClusterError(
            f"--from {file}: is no configuration of axolotl (base_model: …), LLaMA-Factory (model_name_or_path, "
            "finetuning_type …) or TRL's SFT script (--model_name_or_path, --use_peft …)"
        )
    into.finish()
    return into


def _settings(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            data = opened.read(_LARGEST_BYTES + 1)
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise ClusterError(f"--from {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ClusterError(f"--from {file}: is no text in UTF-8") from None
    if len(data) > _LARGEST_BYTES:
        raise ClusterError(f"--from {file}: is larger than a configuration ({_LARGEST_BYTES} bytes)")
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        found = None
        if "--model_name_or_path" not in text:
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ClusterError(f"--from {file}: is neither YAML ({line}) nor a command line") from None
    return {str(k): v for k, v in found.items()} if isinstance(found, dict) else trl.arguments_of(text)
