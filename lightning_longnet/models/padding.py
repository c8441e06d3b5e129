"""Rows with padding on any side and packed rows, in the form in which a causal LongNet computes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_longnet.layers.positions import checked_positions, document_index


@dataclass(frozen=True)
class TokenRows:
    """Rows (B, N) whose tokens stand first and whose padding follows.

    A pattern counts the tokens of a row from its first, and a causal one shows no token what follows it.  So a row
    gives the same as without its padding, whatever the padding holds, and needs no mask.

    Attributes:
        order: (B, N), the former index of what stands at each place; None where all tokens stood first already.
        is_token: (B, N), False at the places of padding, which are the last; None where there is no padding.
        documents: (B, N), the document at each place, which does not decrease; None where each row is one document.
    """

    order: Tensor | None = None
    is_token: Tensor | None = None
    documents: Tensor | None = None

    def arrange(self, x: Tensor) -> Tensor:
        """Return x (B, N) or (B, N, dim) with the tokens first."""
        return x if self.order is None else _gathered(x, self.order)

    def restore(self, x: Tensor) -> Tensor:
        """Return x (B, N) or (B, N, dim) in the former order."""
        return x if self.order is None else _gathered(x, self.order.argsort(1))

    def positions(self) -> Tensor | None:
        """Return the index (B, N) of each token in its document, and 0 for padding; None where no row has padding.

        Without it, padding that makes a row longer than the learned positions would be refused.
        """
        if self.is_token is None:
            return None
        documents = torch.zeros_like(self.is_token, dtype=torch.int64) if self.documents is None else self.documents
        return document_index(documents) * self.is_token


def token_rows(
    x: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, separates_padding: bool = False
) -> TokenRows:
    """Return the rows of x (B, N, ...) as transformers describes them.

    Args:
        x: the tokens, of which the shape and the device are read.
        attention_mask: (B, N), 1 where a token is, 0 where padding is; None has no padding.
        position_ids: (B, N) or (1, N), the index of each token in its row, or in its document, which begins where the
            index is 0.  Padding is not counted, and its values are not read.  None counts each row.
        separates_padding: makes the padding of a row a separate document, for layers that may read what follows a
            token, and for curves.
    """
    order = is_token = None
    if attention_mask is not None:
        former = _checked_mask(attention_mask, x)
        if not former.all():
            is_token = former.sort(1, descending=True).values
            if not torch.equal(is_token, former):
                order = former.byte().argsort(dim=1, descending=True, stable=True)
    rows = TokenRows(order, is_token)
    documents = None
    if position_ids is not None:
        if position_ids.dim() != 2:
            raise ValueError(
                f"position_ids must be (batch, tokens) or (1, tokens), got shape {tuple(position_ids.shape)}"
            )
        if len(position_ids) == 1:
            position_ids = position_ids.expand(len(x), -1)
        documents = _documents(rows.arrange(checked_positions(position_ids, x, "position_ids")), is_token)
    if separates_padding and is_token is not None:
        documents = ~is_token + (0 if documents is None else documents)
    return TokenRows(order, is_token, documents)


def _checked_mask(attention_mask: Tensor, x: Tensor) -> Tensor:
    """Return the mask as bools (B, N), True where a token is."""
    if attention_mask.shape != x.shape[:2]:
        raise ValueError(
            f"attention_mask must be (batch, tokens), {tuple(x.shape[:2])}, got shape {tuple(attention_mask.shape)}: "
            f"which tokens a token attends to is the pattern's, and a mask only marks padding"
        )
    if not ((attention_mask == 0) | (attention_mask == 1)).all():
        raise ValueError(
            "attention_mask must be 1 where a token is and 0 where padding is, and holds other values: give documents "
            "that share a row as position_ids which restart at 0"
        )
    return attention_mask != 0


def _documents(index: Tensor, is_token: Tensor | None) -> Tensor | None:
    """Return the document (B, N) at each place, or None where each row is one.

    `index` (B, N) is that of the tokens in their documents, with the tokens first.
    """
    begins = index == 0
    follows = torch.zeros_like(begins)
    follows[:, 1:] = index[:, 1:] == index[:, :-1] + 1
    counts = begins | follows
    if is_token is not None:
        begins, counts = begins & is_token, counts | ~is_token
    if not counts.all():
        row, place = (~counts).nonzero()[0].tolist()
        before = f"after {index[row, place - 1].item()}" if place else "at its first token"
        raise ValueError(
            f"position_ids must count the tokens of each row, or of each document in it, from 0 and without the "
            f"padding of attention_mask, as the pattern counts them; row {row} has {index[row, place].item()} {before}"
        )
    documents = begins.cumsum(1)
    return documents if (documents > 1).any() else None


def _gathered(x: Tensor, order: Tensor) -> Tensor:
    """Return x (B, N, ...) with what `order` (B, N) names at each place."""
    return x[torch.arange(len(x), device=x.device)[:, None], order]
