"""The documents as a site: built without a warning, readable without a network, and every link leads somewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from docs.blocks import PAGES, REPOSITORY
from testing.timeouts import PATIENCE_SECONDS

DOCS = REPOSITORY / "docs"
LINK = re.compile(r"\]\((?P<target>[\w./#:%~-]+)\)")
FETCHING = {"img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src"}


def build(docs: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """As 'make docs' does."""
    options = ("--fail-on-warning", "--nitpicky", "--quiet", "-d", site.with_name("doctrees"))
    command = [sys.executable, "-m", "sphinx", *options, docs, site]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = build(DOCS, folder)
    assert done.returncode == 0, done.stderr
    return folder


class Attributes(HTMLParser):
    """Links of a page, what it fetches, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched, self.links, self.anchors = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if found.get("id"):
            self.anchors.add(found["id"])
        if tag in FETCHING and found.get(FETCHING[tag]):
            self.fetched.append(found[FETCHING[tag]])
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])


def pages_of(site):
    return sorted(site.rglob("*.html"))


def test_every_document_is_a_page_of_the_site(site):
    sources = {path.relative_to(DOCS).with_suffix(".html") for path in DOCS.rglob("*.md")}
    assert sources <= {path.relative_to(site) for path in pages_of(site)}


def test_pages_fetch_nothing_from_a_network(site):
    for page in pages_of(site):
        for address in Attributes(page.read_text("utf-8")).fetched:
            assert not urlsplit(address).netloc, f"{page.name}: {address}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", style.read_text("utf-8")), style


def test_links_of_the_site_lead_to_pages_anchors_and_files_of_the_repository(site):
    parsed = {page: Attributes(page.read_text("utf-8")) for page in pages_of(site)}
    for page, found in parsed.items():
        for link in found.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert target.exists(), f"{page.relative_to(site)}: {link}"
            if parts.fragment and target in parsed:
                assert unquote(parts.fragment) in parsed[target].anchors, f"{page.relative_to(site)}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_links_of_a_page_lead_to_files_of_the_repository(page):
    for link in LINK.finditer(page.read_text("utf-8")):
        path = urlsplit(link["target"])
        if not path.scheme and path.path:
            assert (page.parent / path.path).exists(), link["target"]


def test_pictures_are_small():
    assert max(path.stat().st_size for path in (DOCS / "pictures").iterdir()) < 110_000


def test_the_generated_reference_is_fresh():
    command = [sys.executable, DOCS / "generate.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("# A\n\n[x](none.md)", "none.md"),
        ("# A\n\n[x](../api/none.py)", "../api/none.py is not there"),
        ("# A\n\n[x](index.md#none)", "none"),
        ("# A\n\n![x](none.svg)", "none.svg"),
        ("no title\n", "title"),
    ],
)
def test_an_error_is_a_warning_and_so_the_end(text, complaint, tmp_path):
    docs = tmp_path / "repository" / "docs"
    docs.mkdir(parents=True)
    shutil.copy(DOCS / "conf.py", docs)
    shutil.copy(REPOSITORY / "pyproject.toml", docs.parent)
    (docs / "index.md").write_text("# Index\n\n[a](a.md)\n")
    (docs / "a.md").write_text(text)
    done = build(docs, tmp_path / "site")
    assert done.returncode != 0
    assert complaint in done.stderr
