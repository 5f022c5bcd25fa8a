"""Safetensors headers: names, types and shapes of all tensors, in the first bytes of a file.

Pure: the bytes are read by whoever can reach them: ``qlora_cli.memory_plan.model_headers`` over ranged requests, the
trainer from disk.
https://huggingface.co/docs/safetensors/index#format: eight bytes with the header's length, little-endian, then JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""safetensors itself reads no longer header."""
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class HeaderError(ValueError):
    """Bytes that are no safetensors header; the text completes a sentence that begins with the file's name."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file."""

    dtype: str
    """safetensors' name: BF16, F32, U8, …"""
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        count = 1
        for length in self.shape:
            count *= length
        return count


def header_length(first: bytes) -> int:
    """Bytes of the JSON that follows the file's first eight bytes.

    Raises:
        HeaderError: it cannot be a safetensors file.

    """
    length = int.from_bytes(first[:LENGTH_BYTES], "little")
    if len(first) < LENGTH_BYTES or not 0 < length <= MAX_HEADER_BYTES:
        raise HeaderError("does not begin as a safetensors file does")
    return length


def parse_header(text: bytes) -> dict[str, TensorInfo]:
    """The JSON of a header: tensor name → type and shape.

    Raises:
        HeaderError: it cannot be read.

    """
    try:
        return tensor_infos(json.loads(text))
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise HeaderError("has a safetensors header that cannot be read") from error


def tensor_infos(header: Mapping[str, Mapping[str, Any]]) -> dict[str, TensorInfo]:
    """A header that is parsed already, such as ``qlora_trainer.storage.model_files.safetensors_header`` gives."""
    return {
        name: TensorInfo(str(entry["dtype"]), tuple(int(n) for n in entry["shape"]))
        for name, entry in header.items()
        if name != "__metadata__"
    }


def shard_names(index: bytes) -> list[str]:
    """The files that ``model.safetensors.index.json`` names.

    Raises:
        HeaderError: it cannot be read.

    """
    try:
        shards: Iterable[Any] = json.loads(index)["weight_map"].values()
        names = sorted({str(shard) for shard in shards})
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise HeaderError("cannot be read") from error
    if not names or not all(name.endswith(".safetensors") and "/" not in name for name in names):
        raise HeaderError("does not name .safetensors files beside it")
    return names
