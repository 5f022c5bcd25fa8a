"""Show an inspection as text, and as JSON. No I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from qlora_cli.inspection.inspected_layers import BLOCKS, DEFAULT, FORMATS, error_of, share_of
from qlora_cli.text import kubernetes_yaml, units

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from qlora_cli.inspection.inspected_layers import InspectedLayer, Inspection

KIND_HEADS = ("Kind", "Layers", "Weights", *FORMATS, "> 3 sd", "> 6 sd", "Largest")
FORMAT_HEADS = ("Format", "Block", "Error", "Bits a weight", "Size", "Saved")
CONSTANT_HEADS = ("Double quantization, block", "Constants", "Mean", "Their error", "Error added to NF4")
WORST_HEADS = ("Layer", f"Error, {DEFAULT}", "In 16 bits", "All together", "Error of the base")


def kind_rows(found: Inspection) -> list[list[str]]:
    """Return a row for each kind of layer, errors at block size 64."""
    return [
        [
            kind,
            units.number(len(layers)),
            units.number(sum(layer.linear.elements for layer in layers)),
            *(f"{error_of(layers, form):.4f}" for form in FORMATS),
            *(f"{share_of(layers, sigmas):.3%}" for sigmas in ("3", "6")),
            f"{max(layer.largest for layer in layers):.1f} sd",
        ]
        for kind, layers in found.kinds().items()
    ]


def format_rows(found: Inspection) -> list[list[str]]:
    """Return a row for each format and block size."""
    return [
        [
            each.form,
            str(each.block or "a row"),
            f"{each.error:.4f}",
            f"{each.bits:.3f}",
            units.size(each.bytes),
            units.size(each.saved_bytes),
        ]
        for each in found.formats()
    ]


def constant_rows(found: Inspection) -> list[list[str]]:
    """Return a row for each block size: the absmax constants that double quantization holds in 8 bits."""
    rows = []
    for block in BLOCKS:
        constants = [layer.constants[str(block)] for layer in found.layers]
        count = sum(entry.count for entry in constants)
        added = error_of(found.layers, DEFAULT, block) - error_of(found.layers, "NF4", block)
        rows.append(
            [
                str(block),
                units.number(count),
                f"{sum(entry.offset * entry.count for entry in constants) / count:.4g}",
                f"{max(entry.error for entry in constants):.4f}",
                f"{added:.6f}",
            ]
        )
    return rows


def worst_rows(found: Inspection, count: int) -> list[list[str]]:
    """Return the worst layers, with what leaving them and all above them in 16 bits costs and gives."""
    worst = found.worst(count)
    return [
        [
            layer.name,
            f"{layer.error(DEFAULT):.4f}",
            f"+{units.size(layer.kept_bytes)}",
            f"+{units.size(sum(other.kept_bytes for other in worst[: index + 1]))}",
            f"{found.error_without(worst[: index + 1]):.4f}",
        ]
        for index, layer in enumerate(worst)
    ]


def skip_modules(found: Inspection, count: int) -> str:
    """Return what to paste into a job's spec."""
    patterns = [found.pattern(layer) for layer in found.worst(count)]
    return kubernetes_yaml.dump({"quantization": {"skipModules": patterns}})


def summary(found: Inspection) -> str:
    """Return how large the base is, and what the tables mean by error and sd."""
    return (
        f"{found.model}: {len(found.layers)} layers, {units.number(found.elements)} weights. "
        "Error: ‖W - Q(W)‖ / ‖W‖; sd: standard deviations of a layer's weights."
    )


def show(found: Inspection, count: int) -> Group:
    """Return the whole answer as text."""
    parts: list[RenderableType] = [
        summary(found),
        "",
        _table(KIND_HEADS, kind_rows(found)),
        "",
        _table(FORMAT_HEADS, format_rows(found)),
        "",
        _table(CONSTANT_HEADS, constant_rows(found)),
    ]
    if count:
        added = sum(layer.kept_bytes for layer in found.worst(count))
        parts += [
            "",
            _table(WORST_HEADS, worst_rows(found, count)),
            "",
            Text(f"To leave these in 16 bits, for {units.size(added)} more on each GPU:", style="dim"),
            Text(skip_modules(found, count).rstrip()),
        ]
    return Group(*parts)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for index, head in enumerate(heads):
        table.add_column(head, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def as_dict(found: Inspection, count: int) -> dict[str, Any]:
    """Return the whole answer for programs."""
    worst = found.worst(count)
    return {
        "model": found.model,
        "weights": found.elements,
        "formats": [
            {
                "format": each.form,
                "blockSize": each.block,
                "error": each.error,
                "bytes": each.bytes,
                "bitsPerWeight": each.bits,
                "savedBytes": each.saved_bytes,
            }
            for each in found.formats()
        ],
        "layers": [_layer(layer) for layer in found.layers],
        "skipModules": [found.pattern(layer) for layer in worst],
        "skippedBytes": sum(layer.kept_bytes for layer in worst),
        "errorWithSkipModules": found.error_without(worst),
    }


def _layer(layer: InspectedLayer) -> dict[str, Any]:
    return {
        "name": layer.name,
        "kind": layer.kind,
        "outputs": layer.outputs,
        "inputs": layer.inputs,
        "experts": layer.experts,
        "errors": layer.errors,
        "constants": {block: constants.model_dump() for block, constants in layer.constants.items()},
        "outliers": layer.outliers,
        "largest": layer.largest,
        "keptBytes": layer.kept_bytes,
    }
