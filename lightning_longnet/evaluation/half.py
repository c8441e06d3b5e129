"""The state of a text that is half scored, on the disk, so that a run that was killed goes on within the text."""

from __future__ import annotations

import json
import os
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lightning_longnet.checkpointing.caches import load_cache, save_cache
from lightning_longnet.evaluation.stream import TextStates

if TYPE_CHECKING:
    from pathlib import Path

    from lightning_longnet.evaluation.ranks import Ranks
    from lightning_longnet.models.longnet import LongNet

_SECONDS = 60.0  # between two saves


class HalfScored:
    """Saves the cache and the sums of a text once a minute, where safetensors is installed and the model has a cache.

    The sums name the file of the cache, and are replaced at once, so both are always of the same place in the text.

    Args:
        path: the path of the file that the run writes; the names of the state begin with it.
        text: the number of the text.
    """

    def __init__(self, path: Path, text: int) -> None:
        self.path, self.text = path.with_name(f"{path.name}.half"), text
        self._saved = time.monotonic()

    def load(self, model: LongNet, ranks: Ranks) -> tuple[dict[str, Any], TextStates] | None:
        """Return the sums and the states with which the text goes on; None where none were saved."""
        sums = ranks.first(lambda: json.loads(self.path.read_text()) if self.path.exists() else None)
        if sums is None or sums["text"] != self.text:  # of a text that is finished
            return None
        path = self.path.with_name(sums["cache"])
        cache = ranks.together(lambda: load_cache(path, model, group=ranks.group))
        states = TextStates(model, sums["separator"], cache, ranks)
        states.documents = sums["documents"]
        return sums, states

    def save(self, states: TextStates, sums: dict[str, Any]) -> None:
        """Save the state after a block, if a minute has passed since the last time."""
        ranks = states.ranks
        if states.cache is None or not ranks.first(self._is_due):
            return
        cache = self.path.with_name(f"{self.path.name}-{self.text}-{sums['blocks']}.safetensors")
        save_cache(states.cache, cache, states.model)
        about = {"text": self.text, "cache": cache.name, "documents": states.documents, "separator": states.separator}
        ranks.first(lambda: self._replace(sums | about, cache))
        self._saved = time.monotonic()

    def _is_due(self) -> bool:
        return find_spec("safetensors") is not None and time.monotonic() >= self._saved + _SECONDS

    def _replace(self, sums: dict[str, Any], cache: Path) -> None:
        """Write the sums, which name the file of the cache, and remove the caches before it."""
        part = self.path.with_name(f"{self.path.name}.part")
        part.write_text(json.dumps(sums))
        os.replace(part, self.path)
        self._remove_caches(but=cache)

    def remove(self) -> None:
        """Remove the state of a text that is finished."""
        self.path.unlink(missing_ok=True)
        self._remove_caches()

    def _remove_caches(self, but: Path | None = None) -> None:
        for path in self.path.parent.iterdir():
            if path.name.startswith(f"{self.path.name}-") and path != but:
                path.unlink()
