"""Write what the chart repeats of other files: its copies of the CRDs, and the table of values in its README.

python charts/generate.py          writes
python charts/generate.py --check  says what is stale, and fails
"""  # noqa: INP001 a script

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / ".ci"))
from generated import write_or_check

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
        CHART / "files" / "sweep-crd.yaml": (REPOSITORY / "crds" / "qlora.dev_qlorasweeps.yaml").read_text(),
        readme: TABLE.sub(lambda _: f"{table}\n\n", readme.read_text()),
    }


def values_table(text: str) -> Iterator[str]:
    """Yield the documented values as Markdown, a table for each section of the file."""
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


if __name__ == "__main__":
    sys.exit(write_or_check("The chart's generated files", generated(), "chart"))
