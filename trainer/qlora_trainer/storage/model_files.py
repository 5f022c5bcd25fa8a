"""Check a model's folder before a weight is loaded: whole safetensors, a tokenizer, and no code.

Checks read names, JSON files and safetensors headers, never tensor data: seconds for a model of any size. Whoever wrote
the files may mean harm: no JSON file is parsed that is larger than ``MAX_JSON_BYTES`` or has more than
``qlora_memory.shape.safetensors_headers.MAX_VALUES`` values. All raise :class:`ModelFilesError`, whose text completes a
sentence that begins with the folder's name.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from qlora_memory.shape.safetensors_headers import (
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    MAX_INDEX_BYTES,
    HeaderError,
    TensorInfo,
    parse_json,
    read_header,
    tensor_infos,
)
from qlora_storage.object_store import sha256_bytes, sha256_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SINGLE_WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
MAX_JSON_BYTES = 16 << 20
"""Maximum size of a configuration; those of published models have less than 1 MB, mostly in a list of special
tokens."""
MAX_TOKENIZER_BYTES = 64 << 20
"""Maximum size of a tokenizer's file; the largest published ones have about 40 MB."""
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
CONFIGURATIONS = (CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG, "special_tokens_map.json", "chat_template.json")
"""Files from which transformers takes arguments by name."""
OTHER_WEIGHTS = "transformers_weights"
"""A key of config.json: the file that transformers loads in place of the usual ones, pickled or not."""
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "tiktoken.model",
    "spiece.model",
    "spm.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)
TOOL_TEMPLATE = "additional_chat_templates/tool_use.jinja"
"""A second chat template, which transformers takes where there are tools; the only file that is not at the top."""
TOKENIZER_FILES = (
    *VOCABULARIES,
    "merges.txt",
    "bpe.codes",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    TOOL_TEMPLATE,
)
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""Files of a base that takes images or sound: never read here, and published with a merged model."""
CONVERT = (
    "convert it once with AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder), and the tokenizer "
    "likewise"
)


class ModelFilesError(ValueError):
    """A model's folder cannot be used; the text says why and what to do."""


def is_side_file(name: str) -> bool:
    """Tell whether a file beside the weights is wanted: of configuration, tokenizer or processor.

    A closed list: with the weights, these are all files of a base that a library ever sees.
    """
    return name in (CONFIG, GENERATION_CONFIG, WEIGHTS_INDEX, *PROCESSOR_FILES) or is_tokenizer_file(name)


def is_in_place(name: str) -> bool:
    """Tell whether a file lies where files of a model do."""
    return "/" not in name or name == TOOL_TEMPLATE


def max_bytes(name: str) -> int:
    """Return how large a side file may be."""
    if name == WEIGHTS_INDEX:
        return MAX_INDEX_BYTES
    return MAX_TOKENIZER_BYTES if name in (*VOCABULARIES, "merges.txt") else MAX_JSON_BYTES


def is_tokenizer_file(name: str) -> bool:
    return name in TOKENIZER_FILES or (name.endswith(".tiktoken") and "/" not in name and not name.startswith("."))


def weight_names(names: Iterable[str], read: Callable[[str], bytes]) -> list[str]:
    """Choose the weight files transformers will read, from all names in the folder.

    Args:
        names: files at the top of the folder.
        read: gives the content of one; asked for the index alone, and only if it is needed.

    Raises:
        ModelFilesError: there are no safetensors, or the index cannot be read or names what is not there.

    """
    names = set(names)
    if SINGLE_WEIGHTS in names:
        return [SINGLE_WEIGHTS]
    if WEIGHTS_INDEX in names:
        shards = _shards(read(WEIGHTS_INDEX))
        if missing := [shard for shard in shards if shard not in names]:
            raise ModelFilesError(f"lacks {', '.join(missing)}, which {WEIGHTS_INDEX} names; copy the model again")
        return shards
    if pickled := sorted(n for n in names if n.endswith(PICKLED)):
        raise ModelFilesError(f"has only pickled weights ({', '.join(pickled)}), which could run any code; {CONVERT}")
    other = sorted(n for n in names if n.endswith(".safetensors"))
    found = f"; it has {', '.join(other)}, which is not what save_pretrained writes for a whole model" if other else ""
    raise ModelFilesError(f"has neither {SINGLE_WEIGHTS} nor {WEIGHTS_INDEX}{found}")


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a folder that transformers will read.

    Raises:
        ModelFilesError: as :func:`weight_names`.

    """
    names = [path.name for path in folder.iterdir() if path.is_file()]
    return [folder / name for name in weight_names(names, lambda name: (folder / name).read_bytes())]


def check_names(names: Iterable[str]) -> None:
    """Refuse a folder for what it lacks, before anything is downloaded.

    Raises:
        ModelFilesError: no config.json, or no tokenizer.

    """
    names = set(names)
    if CONFIG not in names:
        hint = (
            " (adapter_config.json is there: this is an adapter, name its base)"
            if "adapter_config.json" in names
            else ""
        )
        raise ModelFilesError(f"has no {CONFIG}{hint}")
    if "adapter_config.json" in names:
        raise ModelFilesError("has an adapter_config.json: transformers would load that adapter into the base")
    if not any(n in VOCABULARIES or n.endswith(".tiktoken") for n in names):
        raise ModelFilesError(f"has no tokenizer; one of {', '.join(VOCABULARIES)} must be there")


def check_code(name: str, content: bytes) -> None:
    """Refuse a JSON file that cannot be read, asks for the repository's code, or sends the loader to other weights.

    Raises:
        ModelFilesError: not a JSON object, or it has ``transformers_weights``, or an ``auto_map`` and is neither that
            of the model nor of its tokenizer: whether transformers has these classes itself is found out by
            ``qlora_trainer.model.base_model.causal_config`` and ``qlora_trainer.model.tokenizer.load_tokenizer``.

    """
    value = json_object(name, content)
    references = value.get("auto_map")
    if references and name not in (CONFIG, TOKENIZER_CONFIG):
        raise ModelFilesError(
            f"brings its own code (auto_map in {name}: {json.dumps(references)}), which is never run; delete auto_map "
            "if transformers has the class itself"
        )
    if value.get(OTHER_WEIGHTS) is not None:
        raise ModelFilesError(
            f"has a {name} that names other weights ({OTHER_WEIGHTS}: {json.dumps(value[OTHER_WEIGHTS])}), which are "
            f"not checked; delete {OTHER_WEIGHTS}: {SINGLE_WEIGHTS} or the files of {WEIGHTS_INDEX} are loaded"
        )


def json_object(name: str, content: bytes) -> dict[str, Any]:
    """Parse a configuration.

    Raises:
        ModelFilesError: it is no JSON object, or would take too much time and memory.

    """
    if len(content) > max_bytes(name):
        raise ModelFilesError(f"has a {name} of {len(content)} bytes; at most {max_bytes(name)} are read")
    try:
        value = parse_json(content)
    except (ValueError, RecursionError) as error:
        raise ModelFilesError(f"has a {name} that is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelFilesError(f"has a {name} that is not a JSON object")
    return value


def check_model(folder: Path) -> None:
    """Check a model's folder for everything that can be known without loading weights.

    Raises:
        ModelFilesError: the first thing that is wrong.

    """
    if not folder.is_dir():
        raise ModelFilesError("is not a folder" if folder.exists() else "does not exist")
    names = [p.name for p in folder.iterdir() if p.is_file()]
    check_names(names)
    check_weights(folder)


def check_weights(folder: Path) -> None:
    """Check configuration and weights alone, as of a merged model.

    Raises:
        ModelFilesError: the first thing that is wrong.

    """
    names = [p.name for p in folder.iterdir() if p.is_file()]
    for name in CONFIGURATIONS:
        if name in names:
            check_code(name, (folder / name).read_bytes())
    for path in weight_files(folder):
        safetensors_header(path)


def safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """Read a safetensors header: tensor name → {dtype, shape, data_offsets}, ``__metadata__`` left out.

    Raises:
        ModelFilesError: the header cannot be read, or the file is not as long as it says.

    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        if size < LENGTH_BYTES or not 0 < length <= min(size - LENGTH_BYTES, MAX_HEADER_BYTES):
            raise ModelFilesError(f"has a {path.name} of {size} bytes without a safetensors header; copy it again")
        text = file.read(length)
    try:
        header, data_bytes = read_header(text)
    except HeaderError as error:
        raise ModelFilesError(f"has a {path.name} that {error}; copy it again") from error
    wanted = LENGTH_BYTES + length + data_bytes
    if size < wanted:
        raise ModelFilesError(
            f"has a {path.name} that is cut short ({size} of {wanted} bytes, a download that did not finish); copy it "
            "again"
        )
    if size > wanted:
        raise ModelFilesError(f"has a {path.name} of {size} bytes where its header says {wanted}; copy it again")
    return header


def weight_infos(folder: Path) -> dict[str, TensorInfo]:
    """Return types and shapes of the weights in all files that transformers will read, as these have them.

    Raises:
        ModelFilesError: as :func:`weight_names` and :func:`safetensors_header`.

    """
    return {
        name: info for path in weight_files(folder) for name, info in tensor_infos(safetensors_header(path)).items()
    }


def headers_revision(folder: Path) -> str:
    """SHA-256 that named a local model in versions up to 0.1: of the weights, headers and sizes alone; hex.

    Runs that these versions began are known by it.
    """
    lines = []
    for path in _files(folder):
        if path.suffix == ".safetensors":
            header = json.dumps(safetensors_header(path), sort_keys=True)
            lines.append(f"{path.name} {path.stat().st_size} {sha256_bytes(header.encode())}")
        elif not path.name.startswith(".") and path.name.endswith((".json", ".model", ".txt", ".jinja", ".tiktoken")):
            lines.append(f"{path.name} {path.stat().st_size} {sha256_file(path)}")
    return _digest(lines)


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_file())


def _digest(lines: list[str]) -> str:
    return sha256_bytes("\n".join(lines).encode())


def _shards(index: bytes) -> list[str]:
    if len(index) > MAX_INDEX_BYTES:
        raise ModelFilesError(f"has a {WEIGHTS_INDEX} of {len(index)} bytes; at most {MAX_INDEX_BYTES} are read")
    try:
        shards = sorted(set(parse_json(index)["weight_map"].values()))
        named_plainly = all(is_shard(shard) for shard in shards)
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise ModelFilesError(f"has a {WEIGHTS_INDEX} that cannot be read: {error}") from error
    if not shards or not named_plainly:
        raise ModelFilesError(f"has a {WEIGHTS_INDEX} that does not name .safetensors files beside it")
    return shards


def is_shard(name: str) -> bool:
    return name.endswith(".safetensors") and not name.startswith(".") and "/" not in name and "\0" not in name
