"""Pieces of an HTML page that has its style inside, no script, and fetches nothing."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from qlora_cli.report.style import STYLE

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Sequence


def document(title: str, head: str, sections: Iterable[str]) -> str:
    """Return a whole page; ``head`` and the sections are HTML, of which empty ones are left out.

    Characters that UTF-8 has no bytes for are replaced.
    """
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n{head}\n"
        + "\n".join(filter(None, sections))
        + "\n</main></body></html>\n"
    )
    return text.encode(errors="replace").decode()


def section(title: str, body: str, kind: str = "") -> str:
    """Return a section of a page; empty where ``body``, which is HTML, is."""
    inner = f'<div class="{kind}">{body}</div>' if kind else body
    return f"<section><h2>{escape(title)}</h2>{inner}</section>" if body else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Container[int] = (), kind: str = "") -> str:
    """Return a table. Cells are HTML; ``numbers``: columns that stand to the right."""

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=n' if index in numbers else ''}>{cell}</{tag}>" for index, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    opening = f"<table{' class=' * bool(kind)}{kind}>"
    return (
        f'<div class="scroll">{opening}<thead><tr>{cells(head, "th")}</tr></thead><tbody>{body}</tbody></table></div>'
    )
