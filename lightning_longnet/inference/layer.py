"""The rows of one layer in a cache, and attention to them."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

import torch

from lightning_longnet.attention import attend
from lightning_longnet.attention.kernels.partial import Partial
from lightning_longnet.inference.branch_attention import NewRows, attend_by_branches
from lightning_longnet.inference.branch_rows import rows_of
from lightning_longnet.inference.rows import RowStore

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_longnet.attention.pattern.pattern import Pattern
    from lightning_longnet.inference.plan import BranchStep, StepPlan
    from lightning_longnet.inference.ranks import CacheRanks

# `attend` computes at least so many tokens that see no row of the cache; its plan takes longer than fewer products
WHOLE_TOKENS = 16
# So many tokens that see rows of the cache are computed a branch at a time, and fewer with a mask over all rows
BRANCH_TOKENS = 128
_ALL = slice(None)


class LayerCache:
    """The keys and values that one layer keeps, by the branches of its pattern.

    A key that later queries see in several branches is kept in each of them.  Where ranks share the cache, each attends
    to the rows that it holds and to its share of the new tokens, and they merge the results.

    Args:
        pattern: the causal pattern of the layer.
        kv_heads: the number of key/value heads.
        head_dim: the width of a head.
        batch: the number of rows of the batch.
        dtype: the dtype of the rows; see `RowStore`.
        device: where the rows are.
        ranks: the ranks that share the cache.
    """

    def __init__(
        self,
        pattern: Pattern,
        kv_heads: int,
        head_dim: int,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        ranks: CacheRanks,
    ) -> None:
        self.pattern, self.kv_heads, self.ranks = pattern, kv_heads, ranks
        self.stores = [
            RowStore(batch, kv_heads, head_dim, dtype, device, branch.capacity, ranks)
            for branch in rows_of(pattern, kv_heads)
        ]

    @property
    def nbytes(self) -> int:
        """The bytes of the slots that are allocated on this rank."""
        return sum(store.nbytes for store in self.stores)

    @property
    def slots(self) -> tuple[int, ...]:
        """The number of slots that are allocated for each branch, on all ranks."""
        return tuple(store.slots for store in self.stores)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: StepPlan,
        *,
        scale: float | None = None,
        kernel: str = "auto",
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attend from new tokens to the rows that are kept and to the new ones, and keep what later tokens see.

        Args:
            q: queries (B, n, H, D).
            k, v: keys and values (B, n, Hkv, D).  All three are of this rank's tokens where ranks share the step.
            plan: the plan of the step for the pattern of this layer.
            scale: factor of the scores; 1 / sqrt(D) by default.
            kernel: the kernel of `attend`, which computes long steps.
            sinks: (H,) one more logit of each query head, without a value.

        Returns:
            (B, n, H, D), 0 where a query sees no key.
        """
        if torch.is_autocast_enabled(q.device.type):
            with torch.autocast(q.device.type, enabled=False):  # autocast would round the scores
                return self.attend(q, k, v, plan, scale=scale, kernel=kernel, sinks=sinks)
        scale = q.shape[3] ** -0.5 if scale is None else scale
        kv = torch.stack((k, v)).transpose(2, 3)  # (2, B, Hkv, n, D)
        if plan.single is not None:
            rows = kv[:, :, :, 0]
            for step in plan.single:
                store = self.stores[step.branch]
                store.grow(step.filled)
                store.put(rows if step.has_all else rows[:, :, step.heads], step.heads, step.slot)
            return self._single(q, plan.single, scale, sinks)
        if plan.shares is not None:
            out = attend(q, k, v, self.pattern, shard=plan.shares.shard, scale=scale, kernel=kernel, sinks=sinks)
        elif plan.tokens.longest >= WHOLE_TOKENS and plan.sees_new_alone:
            documents = plan.tokens.documents
            out = attend(q, k, v, self.pattern, documents=documents, scale=scale, kernel=kernel, sinks=sinks)
        elif plan.tokens.longest >= BRANCH_TOKENS and plan.is_plain:
            assert plan.tokens.uniform is not None
            new = NewRows(q, k, v, plan.tokens.uniform)
            partial = attend_by_branches(new, plan.branches, self.stores, scale, kernel)
            if sinks is not None:
                partial.add_logits_(sinks.to(partial.lse.dtype)[:, None])
            out = partial.out.to(q.dtype)
        else:
            out = self._masked(q, kv, plan, scale, sinks)
        for store, needed in zip(self.stores, plan.needed, strict=True):
            store.grow(needed)
        if plan.shares is not None:
            plan.shares.scatter(kv, self.stores, plan.routes)
            return out
        for store, write in zip(self.stores, plan.writes, strict=True):
            store.scatter(kv, write)
        return out

    def _single(self, q: Tensor, steps: list[BranchStep], scale: float, sinks: Tensor | None) -> Tensor:
        """Return the output of one token in each row, which sees all filled slots of its branches."""
        compute = torch.promote_types(q.dtype, torch.float32)
        grouped = (q if q.dtype == compute else q.to(compute)).reshape(len(q), self.kv_heads, -1, q.shape[3]) * scale
        read = [self.stores[step.branch].read(step.heads, step.filled, compute) for step in steps]
        has_sinks = sinks is not None and self.ranks.rank == 0  # a sink is one more key, of the first rank
        # what each branch shows, and the scores of heads that are not in it
        parts: list[Tensor] = []
        for step, (k, _) in zip(steps, read, strict=True):
            if step.has_all:
                parts.append(grouped @ k.mT)
                continue
            part = grouped.new_full((*grouped.shape[:3], k.shape[2]), -inf)
            part[:, step.heads] = grouped[:, step.heads] @ k.mT
            parts.append(part)
        if has_sinks and sinks is not None:
            logits = sinks.to(compute).view(1, self.kv_heads, -1, 1)
            parts.append(logits.expand(*grouped.shape[:3], 1))
        if not parts:
            parts.append(grouped.new_empty((*grouped.shape[:3], 0)))
        scores = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        # the weights of a head that is in no branch are NaN, and are not read
        weights = scores.softmax(-1)
        out, at = None, 0
        for step, (k, v) in zip(steps, read, strict=True):
            count = k.shape[2]
            own = weights[..., at : at + count] if len(parts) > 1 else weights
            at += count
            if step.has_all and out is None:
                out = own @ v
                continue
            if out is None:
                out = torch.zeros_like(grouped)
            if count:
                out[:, step.heads] += own[:, step.heads] @ v
        if out is None:
            out = torch.zeros_like(grouped)
        self._merge(out, scores)
        return out.reshape(q.shape).to(q.dtype)

    def _masked(self, q: Tensor, kv: Tensor, plan: StepPlan, scale: float, sinks: Tensor | None) -> Tensor:
        """Return the output of tokens which see the rows that the bias of the plan says, and as often as it says."""
        batch, tokens, _, width = q.shape
        compute = torch.promote_types(q.dtype, torch.float32)
        grouped = self._grouped(q, compute, scale).flatten(2, 3)  # (B, Hkv, G n, D)
        read = [store.read(_ALL, slots, compute) for store, slots in zip(self.stores, plan.slots, strict=True)]
        new = kv[:, :, :, self.ranks.share].to(compute)
        read.append((new[0], new[1]))
        bias = plan.bias(compute)
        scores = torch.cat([grouped @ k.transpose(-1, -2) for k, _ in read], -1).unflatten(2, (-1, tokens))
        scores = scores + bias[:, :, None]
        if sinks is not None and self.ranks.rank == 0:
            logits = sinks.to(compute).view(1, self.kv_heads, -1, 1, 1).expand(*scores.shape[:4], 1)
            scores = torch.cat([scores, logits], -1)
        weights = scores.softmax(-1)
        if not plan.all_see_keys:
            weights = weights.masked_fill((bias == -inf).all(-1)[:, :, None, :, None], 0.0)
        parts: tuple[Tensor, ...] = weights.flatten(2, 3)[..., : bias.shape[-1]].split(
            [k.shape[2] for k, _ in read], -1
        )
        out = parts[-1] @ read[-1][1]
        for part, (_, v) in zip(parts[:-1], read[:-1], strict=True):
            out += part @ v
        self._merge(out, scores.flatten(2, 3))
        ungrouped: Tensor = out.view(batch, self.kv_heads, -1, tokens, width).permute(0, 3, 1, 2, 4).reshape(q.shape)
        return ungrouped.to(q.dtype)

    def _merge(self, out: Tensor, scores: Tensor) -> None:
        """Merge out (..., D), of scores (..., keys), with those of the other ranks, in place."""
        if self.ranks.size > 1:
            self.ranks.merge_(Partial(out, scores.logsumexp(-1, keepdim=True)))

    def _grouped(self, q: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
        """Return q (B, n, H, D) times the scale as (B, Hkv, G, n, D)."""
        grouped: Tensor = (q.to(dtype) * scale).unflatten(2, (self.kv_heads, -1))
        return grouped.permute(0, 2, 3, 1, 4)
