"""`needle_grid`: how often a model recalls what is far back, by the length of a row and the depth in it."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lightning_longnet.data.base import check_positive
from lightning_longnet.data.order import seed_of
from lightning_longnet.evaluation.scoring import check_scorable
from lightning_longnet.evaluation.stream import TextStates, block_tokens, one_text
from lightning_longnet.models.embedding import wide
from lightning_longnet.models.longnet import LongNet

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Generator

    from lightning_longnet.evaluation.needle_rows import NeedleRow

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_NOTHING = 1e-3  # a share of right answers by chance that is not worth a word
# the names of embeddings of positions in models of transformers
_POSITIONS = ("wpe", "embed_positions", "position_embeddings", "position_embedding")


class Needles(Protocol):
    """What makes rows: `NumberInText` or `TokenAfterMark`.

    Attributes:
        chance: the share of right answers that guessing gets.
        identity: what the rows depend on, for the journal of a run.
    """

    chance: float
    identity: list[Any]

    def row(self, length: int, depth: float, generator: Generator) -> NeedleRow:
        """Return a row of `length` tokens, with what is to be recalled at a depth from 0 to 1."""


class NeedleCell(NamedTuple):
    """The results of the rows of one length and depth.

    Attributes:
        length: the number of tokens of a row.
        depth: where in the row the answer is, from 0, the beginning, to 1, directly before the question.
        accuracy: the share of rows with a right answer.
        loss: the mean loss of the tokens of the answers, in nats, over the whole vocabulary.
    """

    length: int
    depth: float
    accuracy: float
    loss: float


class NeedleGrid(NamedTuple):
    """The results for each length and depth.

    Attributes:
        cells: the results; all depths of a length follow each other.
        samples: the number of rows of each.
        chance: the share of right answers that guessing gets.
    """

    cells: tuple[NeedleCell, ...]
    samples: int
    chance: float

    @property
    def lengths(self) -> tuple[int, ...]:
        """The numbers of tokens of a row."""
        return tuple(dict.fromkeys(cell.length for cell in self.cells))

    @property
    def depths(self) -> tuple[float, ...]:
        """The depths of the answers."""
        return tuple(dict.fromkeys(cell.depth for cell in self.cells))

    @property
    def accuracy(self) -> Tensor:
        """The share of right answers, (lengths, depths)."""
        shares = torch.tensor([cell.accuracy for cell in self.cells], dtype=torch.float64)
        return shares.view(len(self.lengths), len(self.depths))

    def table(self) -> str:
        """Return the shares of right answers as lines of text, a column for each length."""
        heads = [f"{length:,}" for length in self.lengths]
        widths = [max(len(head), 4) + 2 for head in heads]
        lines = ["depth" + "".join(head.rjust(width) for head, width in zip(heads, widths, strict=True))]
        for depth, shares in zip(self.depths, self.accuracy.T.tolist(), strict=True):
            cells = (f"{share:.0%}".rjust(width) for share, width in zip(shares, widths, strict=True))
            lines.append(f"{depth:.0%}".rjust(5) + "".join(cells))
        return "\n".join(lines)

    def by_chance(self) -> str:
        """Return the share that guessing gets, as the end of a line; an empty text where that is next to none."""
        return f", {self.chance:.1%} by chance" if self.chance >= _NOTHING else ""

    def plot(self, path: Path | str) -> None:
        """Write a heat map as a PNG, SVG or PDF, by the suffix of the path; matplotlib draws it (extra `plots`)."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        rows, columns = len(self.depths), len(self.lengths)
        figure = Figure(figsize=(2.2 + 0.9 * columns, 1.4 + 0.55 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        shares = self.accuracy.T.tolist()
        image = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_xticks(range(columns), [f"{length:,}" for length in self.lengths])
        axes.set_yticks(range(rows), [f"{depth:.0%}" for depth in self.depths])
        axes.set_xticks([column - 0.5 for column in range(1, columns)], minor=True)
        axes.set_yticks([row - 0.5 for row in range(1, rows)], minor=True)
        axes.grid(which="minor", color="white", linewidth=1.5)
        axes.tick_params(which="both", length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("tokens of the row")
        axes.set_ylabel("depth of the answer")
        for i, shown in enumerate(shares):
            for j, share in enumerate(shown):
                axes.text(j, i, f"{share:.0%}", ha="center", va="center", color="black" if share > 0.6 else "white")
        bar = figure.colorbar(image, ax=axes, label=f"right answers{self.by_chance()}")
        bar.ax.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        figure.savefig(path, dpi=150)


def needle_grid(
    model: Any,
    needles: Needles,
    lengths: Sequence[int],
    *,
    depths: Sequence[float] = DEPTHS,
    samples: int = 16,
    seed: int = 0,
) -> NeedleGrid:
    """Return how often a model continues rows by what is said far back in them, by length and depth.

    Args:
        model: a causal language model of one process, whose result for ids (B, N) is its logits, or has them as
            `logits`: a LongNet or a model of transformers.  A LongNet reads long rows in blocks, with a cache.
        needles: the rows: `NumberInText(tokenizer)` or `TokenAfterMark(vocab_size)`.
        lengths: the numbers of tokens of a row.
        depths: where in the row the answer is, from 0 to 1.
        samples: the number of rows of each length and depth.
        seed: the seed of the rows.
    """
    check_grid(model, lengths, depths, samples)
    pairs = [(length, depth) for length in lengths for depth in depths]
    cells = (needle_cell(model, needles, length, depth, samples=samples, seed=seed) for length, depth in pairs)
    return NeedleGrid(tuple(cells), samples, needles.chance)


def check_grid(model: Any, lengths: Sequence[int], depths: Sequence[float], samples: int) -> None:
    """Raise a ValueError where a model has no results for these lengths and depths."""
    check_positive(samples=samples)
    for name, values in (("lengths", lengths), ("depths", depths)):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name} must be different numbers, got {', '.join(map(str, values)) or 'none'}")
    if outside := [depth for depth in depths if not 0 <= depth <= 1]:
        raise ValueError(f"depths must be from 0 to 1, got {outside[0]}")
    if isinstance(model, LongNet):
        check_scorable(model)
    limit = _learned_positions(model)
    if limit is not None and max(lengths) > limit:
        raise ValueError(
            f"lengths must be at most {limit:,}, the learned positions of this {type(model).__name__}, got "
            f"{max(lengths):,}"
        )


@torch.no_grad()
def needle_cell(
    model: Any, needles: Needles, length: int, depth: float, *, samples: int = 16, seed: int = 0
) -> NeedleCell:
    """Return the results of one length and depth; see `needle_grid`."""
    was_training = bool(getattr(model, "training", False))
    if was_training:
        model.eval()
    right, losses = 0, []
    for sample in range(samples):
        generator = torch.Generator().manual_seed(seed_of("needle", seed, length, depth, sample))
        row = needles.row(length, depth, generator)
        logits = _answer_logits(model, row)
        losses.append(-logits.log_softmax(-1).gather(1, row.answer[:, None]).mean())
        if row.candidates is None:
            right += bool((logits.argmax(-1) == row.answer).all())
        else:
            right += bool((row.candidates[logits[:, row.candidates].argmax(-1)] == row.answer).all())
    if was_training:
        model.train()
    return NeedleCell(length, depth, right / samples, float(torch.stack(losses).mean()))


def _answer_logits(model: Any, row: NeedleRow) -> Tensor:
    """Return the logits (n, vocabulary) of the tokens of the answer, each after the right ones before it."""
    ids, count = torch.cat([row.prompt, row.answer[:-1]]), len(row.answer)
    if isinstance(model, LongNet):
        logits: Tensor = model.head(_last_states(model, ids, count))
        model._warn_of_reach(len(ids))
    else:
        logits = _last_logits(model, ids[None], count)[0]
    return logits.to(wide(logits.dtype)).cpu()


def _last_states(model: LongNet, ids: Tensor, count: int) -> Tensor:
    """Return the states (count, dim) of the last tokens of ids (N,), which are read in blocks."""
    stream, kept = TextStates(model), torch.empty(0)
    with one_text(model):
        for block in ids.split(block_tokens(model.config)):
            states = stream.encode(block)
            kept = torch.cat([kept.to(states), states])[-count:]  # a block may be shorter than an answer
    return kept


def _last_logits(model: Any, ids: Tensor, count: int) -> Tensor:
    """Return the logits (B, count, vocabulary) of the last tokens; a model of transformers computes no others."""
    device = next((x.device for x in model.parameters()), None) if isinstance(model, nn.Module) else None
    parameters = inspect.signature(getattr(model, "forward", model)).parameters
    values = {"logits_to_keep": count, "use_cache": False}
    result = model(ids.to(device), **{name: value for name, value in values.items() if name in parameters})
    logits: Tensor = getattr(result, "logits", result)
    return logits[:, -count:]


def _learned_positions(model: Any) -> int | None:
    """Return the number of positions that a model has embeddings for; None where it has none."""
    if isinstance(model, LongNet):
        return model.config.learned_positions
    positions: Any = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if positions is None or not isinstance(model, nn.Module):
        return None
    embeddings = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    return int(positions) if any(name.rpartition(".")[2] in _POSITIONS for name in embeddings) else None
