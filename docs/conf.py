"""The configuration of the docs site, which `make docs` builds into build/docs."""

import re
import sys
import tomllib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from pages import SITE

ROOT = Path(__file__).parents[1]
_ABOUT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

project = "lightning-longnet"
author = _ABOUT["authors"][0]["name"]
copyright = author
html_title = "lightning-longnet"
html_baseurl = SITE

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
highlight_language = "none"

myst_heading_anchors = 4  # as on GitHub, so that links between pages work in both places

default_role = "py:obj"  # docstrings name functions and arguments in single backticks
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
autodoc_inherit_docstrings = False  # Lightning's refer to its own pages
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
pygments_dark_style = "github-dark"  # the default underlines the names of modules
html_static_path = ["static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True}


def _as_rst(app, what, name, subject, options, lines):
    """Make a docstring valid reStructuredText: its asterisks, words that follow a backtick, and indented tables."""
    made = []
    for line in lines:
        if line.lstrip().startswith(">>>"):
            made.append(line)
            continue
        pieces = re.split(r"(``.+?``|`[^`]+`)", line)
        pieces[::2] = [piece.replace("*", r"\*") for piece in pieces[::2]]
        text = re.sub(r"(`[^`]+`)(?=\w)", r"\1\\ ", "".join(pieces))
        starts_table = text.startswith("    ") and made and not made[-1] and len(made) > 1 and made[-2].endswith(":")
        if starts_table and not made[-2].endswith("::"):
            made[-2] += ":"
        made.append(text)
    lines[:] = made


def setup(app):
    """Connect what the site needs beside the configuration."""
    app.connect("autodoc-process-docstring", _as_rst, priority=400)  # before napoleon
