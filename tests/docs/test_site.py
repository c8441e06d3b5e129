"""The docs site: it builds without a warning, has all public names, and its pictures are those that are drawn."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import draw
import pytest

import lightning_longnet

ROOT = Path(__file__).parents[2]
PUBLIC = ("callbacks", "planning", "strategies")  # folders with names that the package itself does not have


def public_names():
    names = set(lightning_longnet.__all__)
    for folder in PUBLIC:
        names |= {f"{folder}.{name}" for name in import_module(f"lightning_longnet.{folder}").__all__}
    return names


def test_the_reference_has_each_public_name_once():
    pages = "".join(page.read_text() for page in ROOT.glob("docs/api/*.md"))
    named = re.findall(r"^\.\. auto\w+:: lightning_longnet\.(\S+)$", pages, flags=re.MULTILINE)
    assert sorted(named) == sorted(public_names())


@pytest.mark.parametrize("name", draw.PICTURES)
def test_pictures_are_those_that_are_drawn(name):
    assert (draw.FOLDER / f"{name}.svg").read_text() == draw.PICTURES[name]()


@pytest.mark.long
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", ROOT / "docs", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in ROOT.glob("docs/**/*.md")}
    assert [page for page in pages if not (tmp_path / page).is_file()] == []
    assert "lightning_longnet.attend" in (tmp_path / "api/attention.html").read_text()
