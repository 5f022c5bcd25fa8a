"""The page of an inspection. HTML with its style inside, no script, nothing fetched."""

from __future__ import annotations

import re
from html import escape
from typing import TYPE_CHECKING

from qlora_cli.inspection import view
from qlora_cli.inspection.layers import DEFAULT
from qlora_cli.report.style import STYLE

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from qlora_cli.inspection.layers import InspectedLayer, Inspection

_NUMBER = re.compile(r"\.(\d+)\.")


def page(found: Inspection, count: int) -> str:
    """Return the whole page."""
    title = f"{found.model}: quantization"
    parts = [
        _section("Kinds of layers, at block size 64", _table(view.KIND_HEADS, view.kind_rows(found))),
        _section("Formats and block sizes", _table(view.FORMAT_HEADS, view.format_rows(found))),
        _section("Double quantization", _table(view.CONSTANT_HEADS, view.constant_rows(found))),
        _section(f"Error of each layer, {DEFAULT} at block size 64", _map(found)),
    ]
    if count:
        paste = f"<pre>{escape(view.skip_modules(found, count))}</pre>"
        parts.append(
            _section(
                "Worst layers",
                _table(view.WORST_HEADS, view.worst_rows(found, count)) + "<p>To leave them in 16 bits:</p>" + paste,
            )
        )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        f"<header><h1>{escape(title)}</h1><p>{escape(view.summary(found))}</p></header>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return _html_table(heads, ([escape(cell) for cell in row] for row in rows))


def _html_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}{' class=n' if index else ''}>{cell}</{tag}>" for index, cell in enumerate(row))

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    head = cells([escape(text) for text in heads], "th")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


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
    return _html_table(["Layer", *kinds], rows)
