"""`Step`: the computation of further tokens of a text, within which all layers attend to a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lightning_longnet.inference.plan import NewTokens, StepPlan, sees_new_alone
from lightning_longnet.inference.shares import SHARED_TOKENS, TokenShares

if TYPE_CHECKING:
    from types import TracebackType

    from torch import Tensor

    from lightning_longnet.inference.cache import DilatedCache
    from lightning_longnet.inference.layer import LayerCache
    from lightning_longnet.layers.positions import Factors, RotaryPositions


class Step:
    """A step of a cache: `with cache.step(n) as step: ... step.layer(0).attend(q, k, v)`."""

    def __init__(self, cache: DilatedCache, tokens: NewTokens, documents: Tensor | None) -> None:
        self.cache, self.tokens, self.documents = cache, tokens, documents
        self.shares = _shares(cache, tokens)
        self._plans: dict[int, StepPlan] = {}
        self.rotations: dict[tuple[object, ...], Factors] = {}

    @property
    def positions(self) -> Tensor:
        """The position (B, n) of each token in its document, and 0 of padding; those of this rank's tokens."""
        positions, is_token = self.tokens.positions, self.tokens.is_token
        if self.shares is not None:
            return positions[:, self.shares.own]
        return positions if is_token is None else positions * is_token

    def part(self, x: Tensor) -> Tensor:
        """Return the x (B, n, ...) of the tokens that this rank computes, of those of the step."""
        return x if self.shares is None else x[:, self.shares.own]

    def whole(self, x: Tensor) -> Tensor:
        """Return the x (B, n, ...) of all tokens of the step, of those that this rank has computed."""
        return x if self.shares is None else self.shares.whole(x)

    def layer(self, number: int) -> LayerStep:
        """Return the step of one layer."""
        layer, kind = self.cache.layers[number], self.cache.kinds[number]
        plan = self._plans.get(kind)
        # a plan of one token does not read the slots
        if plan is None or (plan.single is None and plan.slots != layer.slots):
            options = (self.tokens, layer.slots, self.cache.ranks, self.shares)
            plan = self._plans[kind] = StepPlan(layer.pattern, layer.kv_heads, *options)
        return LayerStep(self, layer, plan)

    def __enter__(self) -> Step:
        self.cache._is_whole = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.cache._commit(self)


class LayerStep(NamedTuple):
    """The step of one layer: what an attention layer is called with instead of positions and documents."""

    step: Step
    cache: LayerCache
    plan: StepPlan

    def rotated(self, rotary: RotaryPositions, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return q and k, rotated by the positions of the tokens; layers of one kind share the cosines and sines."""
        key = (rotary.kind, rotary.base, rotary.head_dim, rotary.scale_base, rotary.segment_length, q.dtype)
        if key not in self.step.rotations:
            self.step.rotations[key] = rotary.factors(q, k, self.step.positions)
        return rotary.turned(q, k, self.step.rotations[key])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Return attention from the new tokens; see `LayerCache.attend`."""
        return self.cache.attend(q, k, v, self.plan, **options)


def _shares(cache: DilatedCache, tokens: NewTokens) -> TokenShares | None:
    """Return the tokens of each rank where the ranks of a cache share those of a step."""
    if cache.ranks.size == 1 or tokens.is_token is not None or tokens.longest < SHARED_TOKENS * cache.ranks.size:
        return None
    if not all(sees_new_alone(pattern, tokens) for pattern in set(cache.patterns)):
        return None
    return TokenShares(cache.ranks, tokens)


def new_tokens(
    begins: tuple[int, ...], tokens: int, counts: list[int] | None, changes: Tensor | None, device: torch.device
) -> NewTokens:
    """Return the positions of further tokens of the texts of a batch.

    Args:
        begins: the position of the next token of each text.
        tokens: how many tokens each text has, padding included.
        counts: how many of them are not padding, which follows them; None for all.
        changes: (B, tokens) where a document begins that is not the one before; None where none does.
        device: where the texts are.
    """
    batch, begin = len(begins), begins[0]
    is_uniform = counts is None and changes is None and begins.count(begin) == batch
    if tokens == 1 and is_uniform:
        positions = torch.full((batch, 1), begin, device=device)
        return NewTokens(positions, begins, (begin + 1,) * batch, uniform=begin)
    places = torch.arange(tokens, device=device)
    positions = torch.tensor(begins, device=device)[:, None] + places
    number = None
    if changes is not None:
        number = changes.cumsum(1)
        last = torch.where(changes, places, 0).cummax(1).values
        positions = torch.where(number > 0, places - last, positions)
    is_token = None
    if counts is not None and min(counts) < tokens:
        is_token = places < torch.tensor(counts, device=device)[:, None]
    if is_token is None and number is None:
        ends = tuple(each + tokens for each in begins)
    else:
        last_places = [tokens - 1] * batch if counts is None else [count - 1 for count in counts]
        rows = positions.tolist()
        ends = tuple(
            rows[row][place] + 1 if place >= 0 else each
            for row, (place, each) in enumerate(zip(last_places, begins, strict=True))
        )
    is_uniform = is_token is None and number is None and len(set(begins)) == 1
    return NewTokens(positions, begins, ends, is_token, number, begin if is_uniform else None)
