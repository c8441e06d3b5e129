"""`needle_grid`: how often a model finds an answer far back, by the length of a row and the depth of the answer."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lightning_longnet.data.base import check_positive
from lightning_longnet.data.order import seed_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


class NeedleGrid(NamedTuple):
    """The share of right answers for each length and depth.

    Attributes:
        lengths: the numbers of tokens of a row.
        depths: where the answer is in the row, from 0, the beginning, to 1, directly before the question.
        accuracy: (lengths, depths), from 0 to 1.
        samples: the rows of each length and depth.
        chance: the share that guessing gets.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    accuracy: Tensor
    samples: int
    chance: float

    def plot(self, path: Path | str) -> None:
        """Write a heat map as a PNG or SVG, by the suffix of the path; matplotlib draws it, from the extra `plots`."""
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
        axes.set_xlabel("tokens of the row")
        axes.set_ylabel("depth of the answer")
        for i, shown in enumerate(shares):
            for j, share in enumerate(shown):
                axes.text(j, i, f"{share:.0%}", ha="center", va="center", color="black" if share > 0.6 else "white")
        bar = figure.colorbar(image, ax=axes, label=f"right answers ({self.chance:.0%} by chance)")
        bar.ax.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        figure.savefig(path, dpi=150)


@torch.no_grad()
def needle_grid(
    model: Any,
    lengths: Sequence[int],
    vocab_size: int,
    *,
    depths: Sequence[float] = DEPTHS,
    answers: int = 8,
    samples: int = 16,
    seed: int = 0,
) -> NeedleGrid:
    """Return how often a model continues a mark as it was continued before, by length and depth.

    A row consists of random tokens of the model's vocabulary.  A mark and an answer are at some depth; the row ends
    with the mark, and an answer counts as right if it has the largest logit of all `answers`.  No other token carries
    information about it.  A model that does not attend to that depth is right with a probability of 1 / `answers`.

    Args:
        model: a causal language model of one process, whose result for ids (B, N) is its logits, or has them as
            `logits`: a LongNet or a model of transformers.
        lengths: the numbers of tokens of a row.
        vocab_size: the number of tokens to draw from; the highest of them are the mark and the answers.
        depths: where the answer is, from 0 to 1.
        answers: the number of different answers.
        samples: the rows of each length and depth.
        seed: the seed of the rows.
    """
    check_positive(samples=samples)
    if not 2 <= answers <= vocab_size - 2:
        raise ValueError(f"answers must be from 2 to vocab_size - 2 = {vocab_size - 2}, got {answers}")
    if wrong := [length for length in lengths if length < 4]:
        raise ValueError(f"lengths must be at least 4, got {wrong[0]}")
    if outside := [depth for depth in depths if not 0 <= depth <= 1]:
        raise ValueError(f"depths must be from 0 to 1, got {outside[0]}")
    first = vocab_size - answers
    was_training = bool(getattr(model, "training", False))
    if was_training:
        model.eval()
    rights = torch.zeros(len(lengths), len(depths), dtype=torch.float64)
    for i, length in enumerate(lengths):
        for j, depth in enumerate(depths):
            for ids, answer in _rows(length, depth, first, answers, samples, seed):
                logits = _last_logits(model, ids[None])[0, first : first + answers]
                rights[i, j] += int(logits.argmax()) == answer
    if was_training:
        model.train()
    return NeedleGrid(tuple(lengths), tuple(depths), rights / samples, samples, 1 / answers)


def _rows(length: int, depth: float, first: int, answers: int, samples: int, seed: int) -> Iterator[tuple[Tensor, int]]:
    """Yield (ids (N,), answer) of each row; `first` is the token of the first answer, and the mark is before it."""
    for sample in range(samples):
        generator = torch.Generator().manual_seed(seed_of("needle", seed, length, depth, sample))
        ids = torch.randint(first - 1, (length,), generator=generator)
        answer = int(torch.randint(answers, (), generator=generator))
        place = round(depth * (length - 3))
        ids[place], ids[place + 1], ids[-1] = first - 1, first + answer, first - 1
        yield ids, answer


def _last_logits(model: Any, ids: Tensor) -> Tensor:
    """Return the logits (B, vocabulary) of the last token; a model of transformers computes no others."""
    device = next((x.device for x in model.parameters()), None) if hasattr(model, "parameters") else None
    forward = getattr(model, "forward", model)
    options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(forward).parameters else {}
    result = model(ids.to(device), **options)
    logits: Tensor = getattr(result, "logits", result)
    return logits[:, -1]
