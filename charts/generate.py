"""Write what the chart repeats of other files: its copy of the CRD, and the table of values in its README.

python charts/generate.py          writes
python charts/generate.py --check  says what is stale, and fails
"""  # noqa: INP001 a script

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[1]
CHART = REPOSITORY / "charts" / "qlora-operator"
TABLE = re.compile(r"(?<=<!-- values: written by 'make chart' -->\n).*(?=<!-- end of values -->)", re.DOTALL)
SECTION = re.compile(r"# -{20,} (?P<title>.+)")
DOCUMENTATION = re.compile(r"(?P<indent> *)# (?P<first>-- )?(?P<text>.*)")
KEY = re.compile(r"(?P<indent> *)(?P<key>\w+):")


def generated() -> dict[Path, str]:
    """Every file that is written here, with what it should hold."""
    readme = CHART / "README.md"
    table = "\n".join(values_table((CHART / "values.yaml").read_text()))
    return {
        CHART / "files" / "crd.yaml": (REPOSITORY / "crds" / "qlora.dev_qlorajobs.yaml").read_text(),
        readme: TABLE.sub(lambda _: f"{table}\n\n", readme.read_text()),
    }


def values_table(text: str) -> Iterator[str]:
    """The documented values as Markdown, a table for each section of the file."""
    values = yaml.safe_load(text)
    for title, path, meaning in documented(text):
        if title:
            yield from ("", f"### {title.capitalize()}", "", "| value | default | meaning |", "| --- | --- | --- |")
        else:
            yield f"| `{path}` | `{json.dumps(_at(values, path), ensure_ascii=False)}` | {meaning} |"


def documented(text: str) -> Iterator[tuple[str, str, str]]:
    """Titles of sections, and dotted paths with what they mean, in the file's order: (title, path, meaning)."""
    above: list[str] = []
    said: list[str] = []
    for line in text.splitlines():
        if section := SECTION.fullmatch(line):
            yield section["title"], "", ""
        elif comment := DOCUMENTATION.fullmatch(line):
            if comment["first"]:
                said = [comment["text"]]
            elif said:
                said.append(comment["text"])
        elif key := KEY.match(line):
            above = [*above[: len(key["indent"]) // 2], key["key"]]
            if said:
                yield "", ".".join(above), " ".join(said)
            said = []


def _at(values: Any, path: str) -> Any:
    for key in path.split("."):
        values = values[key]
    return values


def main() -> int:
    """Exit code: 1 when something is stale and only looked at."""
    parser = argparse.ArgumentParser(description="The chart's generated files")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when something is stale")
    check = parser.parse_args().check
    stale = {path: want for path, want in generated().items() if not path.exists() or path.read_text() != want}
    for path, want in stale.items():
        if check:
            have = path.read_text() if path.exists() else ""
            name = str(path.relative_to(REPOSITORY))
            sys.stdout.writelines(difflib.unified_diff(have.splitlines(True), want.splitlines(True), name, "generated"))
            sys.stdout.write(f"{name} is stale: make chart\n")
        else:
            path.write_text(want)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
