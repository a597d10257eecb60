"""The site builds strictly: no broken link or anchor, every page in the navigation, every API name found."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kvattic

pytest.importorskip("mkdocs", reason="needs the extra docs")
ROOT = Path(__file__).parents[2]
API = ROOT / "docs" / "api"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)], cwd=ROOT,
                          env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Strict mode lets these two pass as information.
    for text in ('not included in the "nav"', "does not contain an anchor"):
        assert text not in done.stderr, done.stderr
    return folder


def test_every_page_is_there(site):
    pages = [path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")]
    assert len(pages) > 20
    for page in [*pages, Path("index.html")]:
        assert (site / page).is_file(), page


def test_what_pages_link_to_outside_of_docs_is_there(site):
    text = re.sub("<[^>]+>", "", (site / "source/examples/attend.py.html").read_text())
    assert "create_sequence(2, capacity_tokens=4096)" in text
    assert "source/examples/generate.py.html" in (site / "index.html").read_text()


def test_what_only_tests_read_is_not_shown(site):
    for page in site.rglob("*.html"):
        text = page.read_text()
        if "source" not in page.relative_to(site).parts:
            assert not re.search(r"(<|&lt;)!-- (run:|not run:|[a-z]\w*\.[\w.]+ -->)", text), page


def test_nothing_but_the_site_is_in_it(site):
    assert not list(site.rglob("*.py")) and not list(site.rglob("*.md"))


def test_every_public_name_has_its_place_in_the_api(site):
    shown = "".join(path.read_text() for path in site.glob("api/*.html"))
    constants = {"BOARD", "GQA", "PAPER", "PRESETS", "TINY", "__version__"}
    missing = [name for name in kvattic.__all__ if name not in constants and f'id="kvattic.{name}"' not in shown
               and f'id="kvattic.errors.{name}"' not in shown]
    assert missing == []
