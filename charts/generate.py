"""Write what the chart repeats of other files: its copy of the CRD, and the values' table in its README.

    python charts/generate.py            write
    python charts/generate.py --check    say what is stale, and fail
"""  # noqa: INP001 a script

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).parents[1]
CHART = REPOSITORY / "charts" / "qlora-operator"
TABLE = re.compile(r"(?<=<!-- values: written by 'make chart' from values.yaml -->\n).*(?=<!-- end of values -->)", re.DOTALL)


def generated() -> dict[Path, str]:
    """Every generated file with what it should hold."""
    readme = CHART / "README.md"
    table = "\n" + "\n".join(values_table((CHART / "values.yaml").read_text())) + "\n\n"
    return {
        CHART / "files" / "crd.yaml": (REPOSITORY / "crds" / "qlora.dev_qlorajobs.yaml").read_text(),
        readme: TABLE.sub(lambda _: table, readme.read_text()),
    }


def values_table(text: str) -> Iterator[str]:
    """One row for each documented value, under the headings of the file's sections."""
    for heading, node, comments in _sections(yaml.compose(text), text):
        if heading:
            yield from ((f"### {heading}", "", "| value | default | meaning |", "| --- | --- | --- |"))
        for path, value in _documented(node, comments):
            yield f"| `{path[0]}` | `{json.dumps(value, ensure_ascii=False)}` | {path[1]} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = {path: want for path, want in generated().items() if not path.exists() or path.read_text() != want}
    for path, want in stale.items():
        if check:
            have = path.read_text() if path.exists() else ""
            sys.stdout.writelines(difflib.unified_diff(have.splitlines(True), want.splitlines(True), str(path), "generated"))
            print(f"{path.relative_to(REPOSITORY)} is stale: make chart")
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(want)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
