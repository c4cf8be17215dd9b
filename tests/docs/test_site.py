"""`make docs` builds one site: no dead link, every page in it, and nothing loaded from outside."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.pages import DOCS, ROOT, linked_pages

# What a browser loads by itself, unlike a link that a reader follows.
LOADED = re.compile(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"?(https?:[^\" >]+)")
STYLE_URL = re.compile(r"(?:url\(|@import )[\"']?(https?:[^\"') ]+)")


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    return subprocess.run(
        [*command, "--config-file", str(config), "--site-dir", str(site)],
        capture_output=True,
        text=True,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the pages and their settings, to be spoilt."""
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    return tmp_path


def test_every_page_has_its_page_on_the_site(site):
    built = {str(page.relative_to(site)) for page in site.rglob("*.html")} - {"404.html"}
    assert built == {str(page.relative_to(DOCS).with_suffix(".html")) for page in pages()}


def test_the_site_loads_nothing_from_outside(site):
    for page in site.rglob("*.html"):
        assert LOADED.findall(page.read_text()) == [], page
    for style in site.rglob("*.css"):
        assert STYLE_URL.findall(style.read_text()) == [], style


@pytest.mark.parametrize(
    "spoilt", ["[a dead link](nowhere.md)", "[a dead anchor](glossary.md#nowhere)"]
)
def test_a_dead_link_fails_the_build(copy, spoilt):
    with (copy / "docs" / "index.md").open("a") as page:
        page.write(f"\n{spoilt}\n")
    done = build(copy / "mkdocs.yml", copy / "site")
    assert done.returncode != 0
    assert "nowhere" in done.stderr


def test_a_page_that_the_menu_leaves_out_fails_the_build(copy):
    (copy / "docs" / "howto" / "forgotten.md").write_text("# Forgotten\n")
    done = build(copy / "mkdocs.yml", copy / "site")
    assert done.returncode != 0
    assert "forgotten.md" in done.stderr


def test_every_page_is_reachable_from_the_index():
    reached, waiting = set(), {DOCS / "index.md"}
    while waiting:
        page = waiting.pop()
        reached.add(page)
        waiting |= {linked for linked in linked_pages(page) if DOCS in linked.parents} - reached
    assert reached == set(pages())


def pages() -> list[Path]:
    return sorted(DOCS.rglob("*.md"))
