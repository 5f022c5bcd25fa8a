"""The site of these documents, built by Sphinx without a warning: make docs

The pages are plain Markdown that reads as well in the repository. Three things are done to them on the way:

- the navigation is what the pages named ``index`` link to, heading by heading;
- a link that leaves this folder leads to the repository (``make docs REPOSITORY=https://…`` where the site is not read
  beside it), and must lead to something that is there;
- a line ``<!-- include: PATH -->`` is replaced by what stands in that file from its first section on.
"""

from __future__ import annotations

import os
import re
import tomllib
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging

HERE = Path(__file__).parent
ROOT = HERE.parent
SCHEME = "repository:"
LINK = re.compile(r"\]\((?P<path>\.\.?/[^)#\s]*)(?P<anchor>#[^)\s]*)?\)")
PAGE = re.compile(r"\]\((?P<page>[\w/-]+)\.md\)")
HEADING = re.compile(r"^## (?P<title>.+)\n", re.MULTILINE)
INCLUDE = re.compile(r"^<!-- include: (?P<path>\S+) -->$", re.MULTILINE)

_about = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
project = _about["name"]
release = version = _about["version"]
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 4
myst_url_schemes = {"http": None, "https": None, SCHEME.rstrip(":"): None}
html_theme = "furo"
html_title = f"{project} {version}"
html_copy_source = False
html_show_copyright = False
html_use_index = False
html_theme_options: dict[str, Any] = {"top_of_page_buttons": []}
repository = os.environ.get("REPOSITORY", "").rstrip("/")


def read(app: Sphinx, name: str, source: list[str]) -> None:
    """A page as Sphinx is to read it."""
    del app
    page = HERE / f"{name}.md"
    text = INCLUDE.sub(lambda found: _included((page.parent / found["path"]).resolve(), name), source[0])
    text = _to_repository(text, page.parent, name)
    source[0] = f"{text}\n{_navigation(text)}" if page.name == "index.md" else text


def _included(path: Path, name: str) -> str:
    text = path.read_text("utf-8")
    return _to_repository(text[text.index("\n## ") :], path.parent, name)


def _to_repository(text: str, folder: Path, name: str) -> str:
    def changed(link: re.Match[str]) -> str:
        target = (folder / link["path"]).resolve()
        if target.is_relative_to(HERE):
            return link[0]
        if not target.exists():
            logging.getLogger(__name__).warning("%s is not there", link["path"], location=name)
        return f"]({SCHEME}{target.relative_to(ROOT).as_posix()}{link['anchor'] or ''})"

    return LINK.sub(changed, text)


def _navigation(text: str) -> str:
    """A hidden table of contents for each section: what it links to, in that order."""
    begins = [*HEADING.finditer(text), None]
    first = text[: begins[0].start()] if begins[0] else text
    sections = [("", first)]
    sections += [(a["title"], text[a.end() : b.start() if b else len(text)]) for a, b in pairwise(begins) if a]
    return "\n".join(_table_of_contents(title, body) for title, body in sections)


def _table_of_contents(title: str, body: str) -> str:
    pages = dict.fromkeys(found["page"] for found in PAGE.finditer(body))
    caption = [f":caption: {title}"] if title else []
    return "\n".join(["```{toctree}", ":hidden:", *caption, "", *pages, "```"]) if pages else ""


def lead_out(app: Sphinx, tree: nodes.document, name: str) -> None:
    """Links to the repository: by its address, else by the way there from the built page."""
    up = os.path.relpath(ROOT, Path(app.outdir) / PurePosixPath(name).parent)
    for link in tree.findall(nodes.reference):
        if link.get("refuri", "").startswith(SCHEME):
            link["refuri"] = f"{repository or up}/{link['refuri'].removeprefix(SCHEME)}"


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("source-read", read)
    app.connect("doctree-resolved", lead_out)
    return {"parallel_read_safe": True}
