"""Texts of strangers on a terminal: escape sequences, overrides of direction and invisible text do not reach it."""

from __future__ import annotations

import ast
import io
import json
import unicodedata
from pathlib import Path

import pytest
import yaml
from rich.live import Live
from rich.table import Table
from rich.text import Text

from qlora_api.untrusted.printable import printable
from qlora_cli.text import kubernetes_yaml, output
from qlora_cli.text.choices import OutputFormat
from qlora_cli.text.printable import as_json, write, write_line

CLI = Path(__file__).parents[3] / "cli" / "qlora_cli"
HOSTILE = [
    pytest.param("\x1b]0;owned\x07", id="title"),
    pytest.param("\x1b]52;c;cm0gLXJm\x1b\\", id="clipboard"),
    pytest.param("\x1b[2J\x1b[H", id="clear"),
    pytest.param("\x1b[8m", id="conceal"),
    pytest.param("\x9b2J", id="c1"),
    pytest.param("\x90q\x9c", id="device-control"),
    pytest.param("ok\rFailed", id="carriage-return"),
    pytest.param("a\x08b", id="backspace"),
    pytest.param("\u202egnp.exe", id="right-to-left-override"),
    pytest.param("\u2066a\u2069", id="isolate"),
    pytest.param("a\u200bb\ufeff", id="invisible"),
    pytest.param("\U000e0041\U000e007f", id="tags"),
    pytest.param("\U000e0100\U000e01ef", id="variation-selectors"),
    pytest.param("a\u00adb\u3164c", id="soft-hyphen-and-filler"),
    pytest.param("a\u2028b", id="line-separator"),
    pytest.param("\udce9", id="lone-surrogate"),
]
CONTROLS = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) in ("Cc", "Cs") and chr(c) not in "\n\t"]


def dangers(text):
    direction = ("RLO", "LRO", "RLE", "LRE", "PDF", "RLI", "LRI", "FSI", "PDI")
    return [
        c
        for c in text
        if c != "\n"
        and c != "\t"
        and (unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(c) in direction)
    ]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("show", ["print", "table", "live", "write", "write_line"])
def test_a_strangers_text_does_not_control_the_terminal(text, show, capsys, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    if show in ("write", "write_line"):
        (write if show == "write" else write_line)(f"before {text} after")
        shown = capsys.readouterr().out
    else:
        stream = io.StringIO()
        screen = output.console()
        screen.file = stream
        if show == "print":
            screen.print(Text(f"before {text} after", style="red"), soft_wrap=True)
        elif show == "table":
            table = Table.grid()
            table.add_row("before", f"{text} after")
            screen.print(table)
        else:
            with Live(Text(f"before {text} after"), console=screen, auto_refresh=False):
                pass
        shown = stream.getvalue()
    assert "before" in shown
    assert "after" in shown
    assert not dangers(shown)


def test_no_control_character_is_printable():
    assert set(printable("".join(CONTROLS))) == {"\ufffd"}


@pytest.mark.parametrize(
    "text", ["عربي", "עברית", "हिन्दी\u200dक", "👩\u200d👩\u200d👧", "é", "漢字", "a\tb\nc", "≥ 1 µs · – “x”"]
)
def test_text_of_any_language_stays_as_it_is(text):
    assert printable(text) == text


def test_colours_of_logs_are_taken_out():
    assert printable("\x1b[1;31mERROR\x1b[0m here") == "ERROR here"


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("form", [OutputFormat.JSON, OutputFormat.YAML])
def test_objects_are_escaped_and_mean_what_they_meant(text, form, capsys):
    if form is OutputFormat.YAML and text == "\udce9":
        pytest.skip("YAML has no lone surrogates")
    output.write_plain({"message": text}, form)
    shown = capsys.readouterr().out
    assert not dangers(shown)
    assert (json.loads(shown) if form is OutputFormat.JSON else yaml.safe_load(shown)) == {"message": text}


def test_json_of_plain_text_stays_readable():
    assert as_json({"a": "é漢"}, indent=None) == '{"a": "é漢"}'
    assert kubernetes_yaml.dump({"a": "é漢"}) == "a: é漢\n"


def test_nothing_writes_to_a_terminal_in_another_way():
    """Every module of the command line writes by this module, or by the console that it makes printable."""
    allowed = {
        "app.py",
        "kubectl_completion.py",
        "commands/manifest/crds.py",
        "text/printable.py",
        "text/output.py",
        "artifacts/merge.py",
    }
    found = []
    for path in CLI.rglob("*.py"):
        name = str(path.relative_to(CLI))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and name not in allowed:
                called = ast.unparse(node.func)
                if called in ("print", "Console", "typer.echo", "typer.secho", "click.echo") or (
                    called.startswith(("sys.stdout.", "sys.stderr."))
                    and not called.endswith(("isatty", "flush", "reconfigure", "fileno"))
                ):
                    found.append(f"{name}:{node.lineno}: {called}")
    assert not found
