"""Scoring of text files: the loss of each token after those before it, summed, and by its position."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import exp, isfinite, log
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_longnet.data.texts import TokenReader, check_tokens, regrouped
from lightning_longnet.evaluation.curve import LossCurve
from lightning_longnet.evaluation.stream import TextStates, block_tokens, one_text
from lightning_longnet.models.embedding import wide

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lightning_longnet.data.texts import Text
    from lightning_longnet.evaluation.half import HalfScored
    from lightning_longnet.evaluation.loading import Loaded
    from lightning_longnet.models.longnet import LongNet


@dataclass
class Score:
    """The score of a text.

    Attributes:
        tokens: number of tokens.
        predicted: number of tokens that were predicted: all but the first of each document.
        loss_sum: the sum of their losses, in nats.
        curve: their mean losses by their position in the document.
        longest: number of tokens of the longest document with a predicted token.
    """

    tokens: int = 0
    predicted: int = 0
    loss_sum: float = 0.0
    curve: LossCurve = field(default_factory=LossCurve)
    longest: int = 0

    def add(self, tokens: int, positions: Tensor, losses: Tensor) -> None:
        """Count so many tokens, of which those at `positions` in their documents were predicted with these losses."""
        self.tokens += tokens
        self.predicted += len(losses)
        self.loss_sum += float(losses.sum(dtype=torch.float64))
        self.curve.add(positions, losses)
        if len(positions):
            self.longest = max(self.longest, int(positions.max()) + 1)

    def state(self) -> dict[str, Any]:
        """Return plain values of which `Score.of` makes an equal score."""
        return {**vars(self), "curve": self.curve.state()}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Score:
        """Return the score of a `state()`."""
        return cls(**{**state, "curve": LossCurve(state["curve"])})

    def figures(self, text: Text) -> dict[str, Any]:
        """Return the values of a text's line of JSON, with the loss in nats per token."""
        loss = self.loss_sum / self.predicted
        return {
            "file": str(text.path),
            "bytes": text.size,
            "tokens": self.tokens,
            "predicted_tokens": self.predicted,
            "loss": loss,
            "perplexity": exp(loss) if loss < 700 else None,  # JSON has no infinity
            "bits_per_byte": loss / log(2) * self.tokens / text.size,
        }


def check_scorable(model: LongNet) -> None:
    """Raise a ValueError where a model does not predict the next token."""
    if not model.config.is_causal:
        raise ValueError(
            "checkpoint must be of a decoder, whose pattern is causal in every layer, to score texts, got an encoder: "
            "it sees the token that it would predict; longnet embed takes encoders"
        )


def score_text(
    source: Loaded,
    text: Text,
    advance: Callable[[float], object],
    *,
    has_documents: bool = False,
    half: HalfScored | None = None,
) -> Score:
    """Return the score of a text, which is read and computed block by block.

    Args:
        source: the model and the tokenizer.
        text: the text.
        advance: called with numbers of bytes of text that are done.
        has_documents: whether each end token of the tokenizer ends a document: tokens neither see nor predict tokens
            of other documents.
        half: where the state of the text is saved, and from where it goes on.
    """
    check_scorable(source.model)
    model = source.model
    ranks = source.ranks
    score, states = Score(), TextStates(model, source.tokenizer.end if has_documents else None, ranks=ranks)
    begin, skipped, done = 0, 0, 0.0
    if half is not None and (saved := half.load(model, ranks)) is not None:
        sums, states = saved
        score, begin, skipped = Score.of(sums["score"]), sums["begin"], sums["blocks"]
    with one_text(model):
        for number, (ids, following, share) in enumerate(ranks.shared(_blocks(source, text))):
            if number >= skipped:
                begin = _add_block(score, states, ids, following, begin)
                if half is not None:
                    half.save(states, {"blocks": number + 1, "score": score.state(), "begin": begin})
            advance(share)
            done += share
    model._warn_of_reach(score.longest if has_documents else score.tokens)
    advance(text.size - done)
    check_tokens(text, score.tokens, 2)
    if not score.predicted:
        raise ValueError(f"each file must hold a document of at least 2 tokens, {text.path} holds none")
    if not isfinite(score.loss_sum):
        raise ValueError(f"the losses of {text.path} must be finite, their sum is {score.loss_sum}: see --dtype")
    return score


def _add_block(score: Score, states: TextStates, ids: Tensor, following: Tensor, begin: int) -> int:
    """Add the losses of a block's tokens, and return where the document of the last begins.

    Args:
        score: the score to add to.
        states: the states of the text.
        ids: (n,), the tokens of the block.
        following: the token (1,) after it; (0,) at the end of the text.
        begin: where the document of the token before the block begins.
    """
    documents = states.document_ids(torch.cat([ids, following]))
    targets = torch.cat([ids[1:], following])
    share = states.ranks.share(len(ids))
    own = targets[share]
    losses = token_losses(states.model, states.encode(ids)[: len(own)], own)
    if states.ranks.size > 1:
        padded = torch.nn.functional.pad(losses, (0, share.stop - share.start - len(own)))
        losses = states.ranks.joined(padded, len(ids))[: len(targets)]
    is_predicted = documents[1:] == documents[:-1]
    places = torch.arange(score.tokens + 1, score.tokens + 1 + len(targets))
    starts = torch.where(is_predicted, begin, places).cummax(0).values  # of the documents of the targets
    score.add(len(ids), (places - starts)[is_predicted], losses[is_predicted])
    return int(starts[-1]) if len(starts) else begin


@torch.no_grad()
def token_losses(model: LongNet, states: Tensor, targets: Tensor) -> Tensor:
    """Return the loss (n,) of each target (n,) after the token of a state (n, dim), on the CPU, in float32 at least."""
    losses = []
    for rows, labels in zip(states.split(model.config.loss_chunk), targets.split(model.config.loss_chunk), strict=True):
        logits = model.head(rows).to(wide(rows.dtype))
        log_probs = logits.log_softmax(-1).gather(1, labels[:, None].to(rows.device))
        losses.append(-log_probs[:, 0].cpu())
    return torch.cat(losses) if losses else torch.zeros(0, dtype=wide(states.dtype))


def _blocks(source: Loaded, text: Text) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Yield the tokens of each block of a text, the token (1,) after it, (0,) after the last, and its bytes."""
    config = source.model.config
    reader = TokenReader(text, source.tokenizer, config.vocab_size)
    for ids, following in _with_following(regrouped(reader, block_tokens(config))):
        yield ids, following, len(ids) * reader.bytes / reader.tokens


def _with_following(blocks: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each block with the token (1,) after it; (0,) after the last."""
    before = next(blocks, None)
    if before is None:
        return
    for block in blocks:
        yield before, block[:1]
        before = block
    yield before, before[:0]
