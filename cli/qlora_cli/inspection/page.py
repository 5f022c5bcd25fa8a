"""The page of an inspection. HTML with its style inside, no script, nothing fetched."""

from __future__ import annotations

import re
from html import escape
from typing import TYPE_CHECKING

from qlora_cli.inspection import view
from qlora_cli.inspection.inspected_layers import DEFAULT
from qlora_cli.report.html import document, section, table

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from qlora_cli.inspection.inspected_layers import InspectedLayer, Inspection

_NUMBER = re.compile(r"\.(\d+)\.")


def page(found: Inspection, count: int) -> str:
    """Return the whole page."""
    title = f"{found.model}: quantization"
    parts = [
        section("Kinds of layers, at block size 64", _table(view.KIND_HEADS, view.kind_rows(found))),
        section("Formats and block sizes", _table(view.FORMAT_HEADS, view.format_rows(found))),
        section("Double quantization", _table(view.CONSTANT_HEADS, view.constant_rows(found))),
        section(f"Error of each layer, {DEFAULT} at block size 64", _map(found)),
    ]
    if count:
        paste = f"<pre>{escape(view.skip_modules(found, count))}</pre>"
        parts.append(
            section(
                "Worst layers",
                _table(view.WORST_HEADS, view.worst_rows(found, count)) + "<p>To leave them in 16 bits:</p>" + paste,
            )
        )
    head = f"<header><h1>{escape(title)}</h1><p>{escape(view.summary(found))}</p></header>"
    return document(title, head, parts)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of texts, with numbers in all columns but the first."""
    cells = ([escape(cell) for cell in row] for row in rows)
    return table([escape(head) for head in heads], cells, range(1, len(heads)))


def _map(found: Inspection) -> str:
    """Return the error of each layer, decoder layers down and kinds across, the more marked the larger it is."""
    kinds = list(found.kinds())
    places: dict[str, dict[str, list[InspectedLayer]]] = {}
    for layer in found.layers:
        number = _NUMBER.search(layer.name)
        places.setdefault(number[1] if number else "-", {}).setdefault(layer.kind, []).append(layer)
    errors = [layer.error(DEFAULT) for layer in found.layers]
    least, most = min(errors), max(errors)

    def cell(layers: list[InspectedLayer]) -> str:
        value = max((layer.error(DEFAULT) for layer in layers), default=0.0)
        share = (value - least) / (most - least) if most > least else 0
        mark = f"color-mix(in srgb,var(--s1) {share:.0%},transparent)"
        return f'<span style="background:{mark};padding:1px 5px">{value:.4f}</span>' if layers else ""

    rows = [[number, *(cell(by_kind.get(kind, [])) for kind in kinds)] for number, by_kind in places.items()]
    return table(["Layer", *map(escape, kinds)], rows, range(1, len(kinds) + 1))
