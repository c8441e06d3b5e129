"""`DilatedCache`: the keys and values that later tokens of a text see."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lightning_longnet.inference.branch_rows import rows_of
from lightning_longnet.inference.layer import BRANCH_TOKENS, LayerCache
from lightning_longnet.inference.ranks import CacheRanks
from lightning_longnet.inference.rows import DTYPES
from lightning_longnet.inference.step import Step, new_tokens
from lightning_longnet.inference.step_sizes import StepSizes
from lightning_longnet.layers.options import positive_integer

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

    from lightning_longnet.models.blocks import BlocksConfig


class DilatedCache:
    """The keys and values of all layers that later tokens see, for `LongNet.forward(cache=)`.

    At position t a head sees only keys of the segments that t is in.  A layer keeps at most `sum w / r` rows a head,
    over the branches of its pattern, however long the text is; of a window its width, and of dense attention all.
    Memory is allocated as it is needed.

    Each row of the batch is a text with a position of its own.

    Args:
        config: the configuration of the model.
        batch: the number of rows of the batch.
        dtype: the dtype of the rows: float64, float32, bfloat16, float16, or int8 with a scale of each row and head.
        device: where the rows are.
        group: the ranks over which the rows are split, a process group of torch; None keeps all of them here.  The
            ranks make the cache alike, and call the model with it together, with the same tokens.

    >>> from lightning_longnet import LongNet, LongNetConfig, Pattern
    >>> pattern = Pattern.dilated((32, 128), (1, 4), is_causal=True)
    >>> model = LongNet(LongNetConfig(pattern, dim=32, layers=2, heads=4)).eval()
    >>> cache, tokens = model.new_cache(), torch.randint(256, (1, 100))
    >>> with torch.no_grad():
    ...     logits = torch.cat([model(tokens[:, :90], cache=cache), model(tokens[:, 90:], cache=cache)], 1)
    >>> bool(torch.allclose(logits, model(tokens), atol=1e-5))
    True
    """

    def __init__(
        self,
        config: BlocksConfig,
        batch: int = 1,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        group: ProcessGroup | None = None,
    ) -> None:
        if reason := refusal(config):
            raise ValueError(reason)
        if dtype not in DTYPES:
            allowed = ", ".join(str(each) for each in DTYPES)
            raise ValueError(f"dtype must be one of {allowed}, got {dtype!r}")
        self.patterns = config.patterns
        self.kv_heads, self.head_dim = config.kv_heads or config.heads, config.dim // config.heads
        self.batch, self.dtype, self.device = positive_integer("batch", batch), dtype, torch.device(device)
        self.ranks = CacheRanks(group)
        self.layers = [
            LayerCache(pattern, self.kv_heads, self.head_dim, batch, dtype, self.device, self.ranks)
            for pattern in self.patterns
        ]
        self.kinds = [self.patterns.index(pattern) for pattern in self.patterns]  # equal where the patterns are
        self._branches = tuple(dict.fromkeys(b for pattern in self.patterns for b in rows_of(pattern, self.kv_heads)))
        self._kind = f"{self.patterns} {self.kv_heads} {self.head_dim} {batch} {dtype}"
        self._selected: tuple[int, ...] = ()  # the number of what `select` was given, in all calls
        self._next = (0,) * batch
        # for each row and branch, the position that `rewind` went to where the rows before it are no longer kept
        self._kept_from = ((0,) * len(self._branches),) * batch
        self._documents: Tensor | None = None  # (B,) the id of the last token's document
        self._is_whole = True

    @property
    def positions(self) -> tuple[int, ...]:
        """The position in its document of the next token of each row."""
        return self._next

    @property
    def nbytes(self) -> int:
        """The bytes of the rows that are allocated on this rank."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def number(self) -> int:
        """A number of what this cache is and holds, that ranks which share it compare; not of its keys."""
        about = (self._kind, self._next, self._kept_from, self._selected, self._is_whole)
        return int.from_bytes(sha256(repr(about).encode()).digest()[:7], "big")

    def kept_rows(self, row: int = 0) -> list[list[int]]:
        """Return how many rows of the text in a row of the batch each layer and head keeps."""
        found = []
        for pattern in self.patterns:
            branches = [branch.seen_later(self._next[row]) for branch in rows_of(pattern, self.kv_heads)]
            found.append([sum(counts) for counts in zip(*branches, strict=True)])
        return found

    def most_rows(self) -> list[int | None]:
        """Return the largest number of rows that a head of each layer keeps; None where nothing bounds it."""
        found: list[int | None] = []
        for pattern in self.patterns:
            capacities = [branch.capacity for branch in rows_of(pattern, self.kv_heads)]
            found.append(None if None in capacities else sum(c for c in capacities if c is not None))
        return found

    def next_count(self, tokens: int) -> int:
        """Return how many of that many further tokens the next step takes, so that its memory is bounded."""
        if tokens == 1:
            return 1
        slots = max(sum(layer.slots) for layer in self.layers) // self.ranks.size
        sizes = StepSizes(self.ranks.size, scores=self.batch * self.kv_heads * (slots + BRANCH_TOKENS))
        return sizes.next_count(tokens, set(self.patterns), set(self._next))

    def check(self, config: BlocksConfig, batch: int, device: torch.device) -> None:
        """Raise a ValueError if this cache is not of a model of this configuration, batch and device."""
        sizes = (config.kv_heads or config.heads, config.dim // config.heads)
        for name, own, given in (
            ("layers", len(self.patterns), len(config.patterns)),
            ("key/value heads and their width", (self.kv_heads, self.head_dim), sizes),
            ("patterns", self.patterns, config.patterns),
            ("rows in a batch", self.batch, batch),
            ("device", self.device, device),
        ):
            if own != given:
                raise ValueError(f"cache must be of this model and batch: its {name}: {own}, the model's: {given}")

    def select(self, rows: Tensor) -> None:
        """Make the texts of some rows those of the batch, in the given order; a row may be taken several times."""
        places = rows.tolist()
        self._selected = (hash((self._selected, tuple(places))),)
        for layer in self.layers:
            for store in layer.stores:
                store.select(rows.to(self.device))
        self.batch, self._next = len(places), tuple(self._next[row] for row in places)
        self._kept_from = tuple(self._kept_from[row] for row in places)
        if self._documents is not None:
            self._documents = self._documents[rows.to(self._documents.device)]

    def rewind(self, tokens: int | Sequence[int]) -> None:
        """Drop the last tokens of each text, as if they had never been computed.

        The rows of a segment are kept up to its end, and those of a window until no later token sees them.  If a later
        token would see rows that are no longer kept, this raises a ValueError and changes nothing.

        Args:
            tokens: how many tokens to drop, of all texts or of each row of the batch.
        """
        self._check_whole()
        given = tokens if isinstance(tokens, Sequence) else [tokens] * self.batch
        if len(given) != self.batch or any(type(n) is not int or n < 0 for n in given):
            raise ValueError(f"tokens must be 0 or more, or a list of {self.batch} such numbers, got {tokens!r}")
        positions = tuple(p - n for p, n in zip(self._next, given, strict=True))
        kept_from = []
        for row, (before, after) in enumerate(zip(self._next, positions, strict=True)):
            if after < 0:
                raise ValueError(f"tokens must be at most those of row {row}, {before}, got {given[row]}")
            if before != after == 0 and self._documents is not None:
                raise ValueError(
                    f"tokens must be fewer than those of the last document of row {row}, {before}, got {given[row]}: "
                    f"rows of the document before it are no longer kept. Keep a copy.deepcopy of the cache from then"
                )
            earliest = self._earliest(row)
            if any(after < e and any(b.seen_later(after)) for b, e in zip(self._branches, earliest, strict=True)):
                raise ValueError(
                    f"tokens must be at most {self.rewindable(row)} in row {row}, got {given[row]}: rows that tokens "
                    f"from {after} on see are no longer kept, as their segment has ended or a window has passed them. "
                    f"Keep a copy.deepcopy of the cache from before these tokens, or compute the text again"
                )
            kept = zip(self._kept_from[row], earliest, strict=True)
            kept_from.append(tuple(after if after < e else before_it for before_it, e in kept))
        self._next, self._kept_from = positions, tuple(kept_from)

    def rewindable(self, row: int = 0) -> int:
        """Return how many of the last tokens of a row `rewind` can always drop.

        `rewind` can also drop more if no later token sees a row that is no longer kept, for example up to the beginning
        of a segment.  Rows before that position stay dropped.
        """
        earliest = max(self._earliest(row))
        return max(0, self._next[row] - max(earliest, 0 if self._documents is None else 1))

    def _earliest(self, row: int) -> list[int]:
        """Return, for each branch, how far back a row of the batch can go so that all rows before are kept."""
        kept = zip(self._branches, self._kept_from[row], strict=True)
        return [max(branch.earliest(self._next[row]), kept_from) for branch, kept_from in kept]

    def _check_whole(self) -> None:
        if not self._is_whole:
            raise ValueError("cache must be whole: a step did not end, and some layers lack its tokens; take a new one")

    def state(self) -> CacheState:
        """Return the tensors of this cache, and plain values that say what they are.

        In one process the tensors share its memory.  Ranks that share the cache call it together, and each gets all.
        """
        tensors = {
            f"{i}.{j}.{name}": x
            for i, layer in enumerate(self.layers)
            for j, store in enumerate(layer.stores)
            for name, x in zip(("rows", "scales"), store.whole(), strict=True)
            if x is not None
        }
        documents = None if self._documents is None else self._documents.tolist()
        about = {"batch": self.batch, "dtype": str(self.dtype).removeprefix("torch."), "positions": list(self._next)}
        kept_from = [list(each) for each in self._kept_from]
        return CacheState(tensors, {**about, "documents": documents, "kept_from": kept_from})

    def restore(self, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Take the state of a cache of the same model, batch and dtype."""
        for i, layer in enumerate(self.layers):
            for j, store in enumerate(layer.stores):
                store.restore(tensors[f"{i}.{j}.rows"], tensors.get(f"{i}.{j}.scales"))
        positions = tuple(map(int, about["positions"]))
        if len(positions) != self.batch or min(positions) < 0:
            raise ValueError(f"positions must be {self.batch}, 0 or more, got {positions}")
        for layer in self.layers:
            for branch, slots in zip(rows_of(layer.pattern, self.kv_heads), layer.slots, strict=True):
                # where no later token sees a row, `rewind` may have gone to a segment that had ended
                needing = [position for position in positions if any(branch.seen_later(position))]
                needed = int(branch.counts(torch.tensor(needing)).max()) if needing else 0
                if slots < min(needed, branch.capacity or needed):
                    raise ValueError(f"positions must be of as many rows as there are, got {positions}")
        kept_from = tuple(tuple(map(int, each)) for each in about["kept_from"])
        sizes = [len(each) for each in kept_from]
        if sizes != [len(self._branches)] * self.batch or any(
            not 0 <= each <= position for position, row in zip(positions, kept_from, strict=True) for each in row
        ):
            raise ValueError(f"kept_from must be positions of {self.batch} rows and their branches, got {kept_from}")
        self._next, self._kept_from = positions, kept_from
        self._selected, self._is_whole = (), True
        documents = about["documents"]
        self._documents = None if documents is None else torch.tensor(documents, device=self.device)

    def step(self, tokens: int, *, counts: list[int] | None = None, documents: Tensor | None = None) -> Step:
        """Return the step of further tokens, a context manager within which all layers attend.

        Args:
            tokens: how many tokens each row has, padding included.
            counts: how many of them are not padding, which follows them; all by default.
            documents: (B, tokens) the id of each token's document, which begins where the id changes.
        """
        self._check_whole()
        if documents is not None and counts is not None:  # padding belongs to the document before it
            last = torch.tensor(counts, device=documents.device)[:, None] - 1
            own = documents.gather(1, torch.arange(tokens, device=documents.device).minimum(last.clamp(min=0)))
            before = own if self._documents is None else self._documents[:, None]
            documents = torch.where(last < 0, before, own)
        return Step(self, new_tokens(self._next, tokens, counts, self._changes(documents), self.device), documents)

    def _changes(self, documents: Tensor | None) -> Tensor | None:
        """Return where a document begins that is not the last token's, (B, tokens); None where none does."""
        if documents is None:
            return None
        before = documents[:, :1] if self._documents is None else self._documents[:, None]
        changes = documents.diff(dim=1, prepend=before) != 0
        return changes if changes.any() else None

    def _commit(self, step: Step) -> None:
        """Count the tokens of a step that all layers have."""
        self._next, self._is_whole = step.tokens.ends, True
        if step.documents is not None:
            self._documents = step.documents[:, -1]
        if step.tokens.documents is not None:  # all rows of a document that began are kept
            begun = step.tokens.documents[:, -1].tolist()
            none = (0,) * len(self._branches)
            self._kept_from = tuple(none if n else each for n, each in zip(begun, self._kept_from, strict=True))


class CacheState(NamedTuple):
    """The tensors of a cache by their names, and plain values."""

    tensors: dict[str, Tensor]
    about: dict[str, Any]


def refusal(config: BlocksConfig) -> str | None:
    """Return why a model of this configuration cannot use a cache; None where it can."""
    if config.attention is not None:
        return f"attention must be None for a cache, which knows the keys of our layers alone, got {config.attention!r}"
    if not config.is_causal:
        return "pattern must be causal in every layer for a cache: later tokens would change what earlier ones saw"
    if config.layer_ordering != "raster":
        return (
            f"ordering must be 'raster' for a cache, got {config.layer_ordering!r}: a curve over a sequence depends on "
            f"its length, so each further token would move all others"
        )
    return None
