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
MAX_HEADER_BYTES = 32 << 20
"""Largest JSON of a header. A tensor takes about 100 bytes of it; published files have a few thousand at most."""
MAX_INDEX_BYTES = 64 << 20
"""Largest JSON that names the file of each tensor; the index of a model of 10¹² parameters has 15 MB."""
MAX_VALUES = 4_000_000
"""Commas and opening brackets of one JSON text. Python parses as many in some seconds, into less than 1 GB."""
DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""Bits of an element of each type that the format has."""
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
    """Return the bytes of the JSON that follows the file's first eight bytes.

    Raises:
        HeaderError: it cannot be a safetensors file.

    """
    length = int.from_bytes(first[:LENGTH_BYTES], "little")
    if len(first) < LENGTH_BYTES or not 0 < length <= MAX_HEADER_BYTES:
        raise HeaderError("does not begin as a safetensors file does")
    return length


def parse_header(text: bytes) -> dict[str, TensorInfo]:
    """Return the JSON of a header: tensor name → type and shape.

    Raises:
        HeaderError: it cannot be read, or lies about its tensors.

    """
    return tensor_infos(read_header(text)[0])


def read_header(text: bytes) -> tuple[dict[str, dict[str, Any]], int]:
    """Parse the JSON of a header and check what it says, as safetensors itself does when it loads the file.

    Returns:
        Tensor name → {dtype, shape, data_offsets}, ``__metadata__`` left out, and the bytes of all tensors together.

    Raises:
        HeaderError: it cannot be read, names a tensor twice, or has a tensor of an unknown type, of other bytes than
            its shape needs, or that overlaps or leaves a hole.

    """
    try:
        header = parse_json(text, no_name_twice=True)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        places = sorted((*_place(name, entry), name) for name, entry in tensors.items())
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        reason = f": {error}" if isinstance(error, HeaderError) else ""
        raise HeaderError(f"has a safetensors header that cannot be read{reason}") from error
    end = 0
    for start, stop, name in places:
        if start != end:
            raise HeaderError(
                f"has a safetensors header that lies: {name[:200]!r} begins at byte {start} instead of {end}"
            )
        end = stop
    return tensors, end


def _place(name: str, entry: Mapping[str, Any]) -> tuple[int, int]:
    """Return where a tensor begins and ends, by its offsets, which must agree with its type and shape."""
    (start, stop), shape, bits = entry["data_offsets"], entry["shape"], DTYPE_BITS.get(entry["dtype"])
    if bits is None or any(type(number) is not int or number < 0 for number in (start, stop, *shape)):
        raise HeaderError(f"{name[:200]!r} has a type, shape or place that is none")
    needed = 0 if 0 in shape else bits
    for length in shape:
        needed *= length
        if needed > 8 * stop:  # before a product of a million numbers has a million digits
            break
    if needed != 8 * (stop - start):
        raise HeaderError(f"{name[:200]!r} has {stop - start} bytes, which is not what its type and shape need")
    return start, stop


def parse_json(text: bytes, *, no_name_twice: bool = False) -> Any:
    """Parse a JSON text that somebody unknown wrote, unless it would take much more memory than it has bytes.

    Raises:
        ValueError: it is not JSON, has more than ``MAX_VALUES`` values, or a name twice in one object.
        RecursionError: it is nested too deep.

    """
    if sum(text.count(mark) for mark in (b",", b"{", b"[")) > MAX_VALUES:
        raise HeaderError(f"it has more than {MAX_VALUES} values")
    return json.loads(text, object_pairs_hook=_unique if no_name_twice else None)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise HeaderError("it has a name twice")
    return found


def tensor_infos(header: Mapping[str, Mapping[str, Any]]) -> dict[str, TensorInfo]:
    """A header that is parsed already, such as ``qlora_trainer.storage.model_files.safetensors_header`` gives."""
    return {
        name: TensorInfo(str(entry["dtype"]), tuple(int(n) for n in entry["shape"]))
        for name, entry in header.items()
        if name != "__metadata__"
    }


def shard_names(index: bytes) -> list[str]:
    """Return the files that ``model.safetensors.index.json`` names.

    Raises:
        HeaderError: it cannot be read.

    """
    if len(index) > MAX_INDEX_BYTES:
        raise HeaderError(f"has {len(index)} bytes; at most {MAX_INDEX_BYTES} are read")
    try:
        shards: Iterable[Any] = parse_json(index)["weight_map"].values()
        names = sorted({str(shard) for shard in shards})
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise HeaderError(f"cannot be read: {error}") from error
    if not names or not all(name.endswith(".safetensors") and "/" not in name for name in names):
        raise HeaderError("does not name .safetensors files beside it")
    return names
