"""The journal of a run over files, by which a run that was killed goes on where it stopped."""

from __future__ import annotations

import json
import os
from hashlib import sha256
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


class Journal:
    """The finished work of a run, as lines of JSON beside the file that the run writes.

    The first line identifies the run; each other is an entry.  A line is on the disk before `add` returns, and a line
    that was cut off is dropped.

    Args:
        out: the file that the run writes, which must not exist.
        run: what the run depends on: files, options, the checkpoint.

    Attributes:
        entries: the entries, of this run and of those before it that were killed.
        data: the path of the unfinished file.
    """

    def __init__(self, out: Path, run: dict[str, Any]) -> None:
        if out.exists():
            raise ValueError(f"--out must be a new file, got {out}, which exists")
        self.path, self.data = out.with_name(f"{out.name}.unfinished"), out.with_name(f"{out.name}.part")
        digest = sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()
        self.entries: list[dict[str, Any]] = []
        out.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            first, *others = self._lines() or [{}]
            if first.get("run") != digest:
                raise ValueError(
                    f"--out must be of this run: {self.path} is of a run with other files or options; remove it, or "
                    f"give another --out"
                )
            self.entries = others
            self._rewrite([first, *others])
        else:
            self._rewrite([{"run": digest}])
        self._file = self.path.open("a")

    def add(self, entry: dict[str, Any]) -> None:
        """Add an entry, and wait until the disk holds it."""
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.entries.append(entry)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the journal; a later run goes on from it."""
        self._file.close()

    def remove(self) -> None:
        """Remove the journal of a run that is finished."""
        self.close()
        self.path.unlink()

    def _lines(self) -> list[dict[str, Any]]:
        """Return the lines of the file that are whole."""
        text = self.path.read_bytes().decode(errors="replace")
        lines = text[: text.rfind("\n") + 1].splitlines()
        try:
            values = [json.loads(line) for line in lines]
        except ValueError as error:
            raise ValueError(f"{self.path} must be as this command left it, got what is no JSON: {error}") from None
        return [each if isinstance(each, dict) else {} for each in values]

    def _rewrite(self, lines: list[dict[str, Any]]) -> None:
        """Write these lines alone, at once."""
        part = self.path.with_name(f"{self.path.name}.new")
        part.write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.replace(part, self.path)
