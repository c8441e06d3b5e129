"""Write pages as notebooks: `python docs/pages.py` writes docs/notebooks/*.ipynb.

A page is the only source of its notebook, text and outputs among them, and a test runs each notebook and compares.
In a page

- a block ```python is code; if it begins with a comment that is a file name, it is that file;
- a block ```console is a command after a dollar sign, and lines of its output;
- a block ```text after code is the output of the code.  In outputs `...` stands for any lines.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
SITE = "https://lightning-longnet.readthedocs.io/en/latest/"
NOTEBOOKS = ("tutorial", "patterns")
_BLOCK = re.compile(r"^```(python|console|text)\n(.*?)^```\n", flags=re.DOTALL | re.MULTILINE)
_FILE = re.compile(r"# (\w+\.py)\n")
_IMAGE = re.compile(r"^!\[.*?\]\((\S+\.png)\)\n", flags=re.MULTILINE)


class Piece(NamedTuple):
    """A piece of a page: its kind (markdown, python, file or console), its text, the name of a file, and its output."""

    kind: str
    text: str
    name: str = ""
    output: str | None = None


def pieces(page: str) -> list[Piece]:
    """Return the pieces of the text of a page, in their order."""
    found, end = [], 0
    for block in _BLOCK.finditer(page):
        between, language, text = page[end : block.start()].strip("\n"), block[1], block[2]
        if between:
            found.append(Piece("markdown", between + "\n"))
        end = block.end()
        if language == "text" and not between and found and found[-1].kind == "python":
            found[-1] = found[-1]._replace(output=text)
        elif language == "console":
            command, _, output = text.removeprefix("$ ").partition("\n")
            found.append(Piece("console", command, output=output))
        elif language == "python" and (file := _FILE.match(text)):
            found.append(Piece("file", text[file.end() :], file[1]))
        else:
            found.append(Piece(language, text))
    if rest := page[end:].strip("\n"):
        found.append(Piece("markdown", rest + "\n"))
    return found


def _on_the_site(text: str) -> str:
    """Return Markdown whose links to pages are those of the site, and without the link to the notebook itself."""
    text = re.sub(r" It is also\s+a\s+\[notebook\]\(\S+\)\.", "", text)
    return re.sub(r"\]\(([\w/]+)\.md(#[\w-]+)?\)", lambda link: f"]({SITE}{link[1]}.html{link[2] or ''})", text)


def _code(source: str, output: str | None, image: bytes | None) -> dict[str, object]:
    """Return a code cell with its outputs."""
    outputs: list[dict[str, object]] = []
    if output:
        outputs.append({"output_type": "stream", "name": "stdout", "text": output.splitlines(keepends=True)})
    if image:
        data = {"image/png": base64.b64encode(image).decode()}
        outputs.append({"output_type": "display_data", "metadata": {}, "data": data})
    lines = source.rstrip("\n").splitlines(keepends=True)
    return {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": outputs, "source": lines}


def notebook(page: str) -> str:
    """Return the notebook of the text of a page, as JSON.  An image after code is the picture that the code draws."""
    cells: list[dict[str, object]] = []
    parts = pieces(page)
    for piece, following in zip(parts, [*parts[1:], Piece("markdown", "")], strict=True):
        if piece.kind == "markdown":
            text = _on_the_site(_IMAGE.sub("", piece.text)).strip("\n")
            if text:
                cells.append({"cell_type": "markdown", "metadata": {}, "source": text.splitlines(keepends=True)})
            continue
        drawn = _IMAGE.match(following.text) if following.kind == "markdown" and piece.kind == "python" else None
        image = (FOLDER / drawn[1]).read_bytes() if drawn else None
        before = {"file": f"%%writefile {piece.name}\n", "console": "!"}.get(piece.kind, "")
        cells.append(_code(before + piece.text, piece.output, image))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 4}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Write all notebooks."""
    (FOLDER / "notebooks").mkdir(exist_ok=True)
    for name in NOTEBOOKS:
        (FOLDER / f"notebooks/{name}.ipynb").write_text(notebook((FOLDER / f"{name}.md").read_text()))


if __name__ == "__main__":
    main()
