"""Synthetic tasks that a model solves only if it attends to tokens far back."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, get_args

import torch

from lightning_longnet.data.base import RowLoaders, check_positive
from lightning_longnet.data.order import seed_of
from lightning_longnet.data.rows import Row, Rows
from lightning_longnet.data.tokenizers import UNKNOWN
from lightning_longnet.layers.loss import IGNORED

if TYPE_CHECKING:
    from torch import Tensor

Task = Literal["recall", "needle", "copy"]
BLANK, MARK, FIRST_ANSWER = 0, 1, 2


class LongRangeRows(Rows):
    """Rows of one task, made at each access; the content of a row depends only on the seed and its number.

    See `LongRangeData` for the tasks and the arguments.
    """

    def __init__(
        self,
        task: Task,
        tokens: int,
        distance: int,
        answers: int,
        items: int,
        pair_tokens: int,
        samples: int,
        *seed: str | int,
    ) -> None:
        self.task, self.tokens, self.distance = task, tokens, distance
        self.answers, self.items, self.samples, self.seed = answers, items, samples, seed
        self.pair_tokens = pair_tokens
        self.identity = repr((task, tokens, distance, answers, items, pair_tokens, seed))
        self.span = spanned(task, distance, items, pair_tokens)

    def __len__(self) -> int:
        return self.samples

    def read(self, i: int, begin: int, end: int) -> Row:
        generator = torch.Generator().manual_seed(seed_of("long range", *self.seed, i))

        def integers(high: int, size: int) -> Tensor:
            return torch.randint(high, (size,), generator=generator)

        ids, labels = torch.full((self.tokens,), BLANK), torch.full((self.tokens,), IGNORED)
        first = int(integers(self.tokens - self.span + 1, 1))
        answers = FIRST_ANSWER + integers(self.answers, self.items)
        if self.task == "recall":
            order = torch.randperm(self.items, generator=generator)
            keys = FIRST_ANSWER + self.answers + order
            question_order = torch.randperm(self.items, generator=generator)
            pairs = slice(first, first + self.pair_tokens * self.items)
            if self.pair_tokens == 2:
                ids[pairs] = torch.stack([keys, answers], 1).flatten()
            else:
                ids[pairs] = FIRST_ANSWER + self.answers + self.items + order * self.answers + answers - FIRST_ANSWER
            queries = slice(pairs.stop - 1 + self.distance, pairs.stop - 1 + self.distance + self.items)
            ids[queries], labels[queries] = keys[question_order], answers[question_order]
        elif self.task == "needle":
            ids[:] = FIRST_ANSWER + integers(self.answers, self.tokens)
            ids[first], ids[first + 1] = MARK, answers[0]
            query = first + 1 + self.distance
            ids[query], labels[query] = MARK, answers[0]
        else:
            ids[first : first + self.items] = answers
            query = first + self.distance
            ids[query], ids[query + 1 : query + self.items] = MARK, answers[:-1]
            labels[query : query + self.items] = answers
        return {"input_ids": ids[begin:end], "labels": labels[begin:end]}


def spanned(task: Task, distance: int, items: int, pair_tokens: int) -> int:
    """Return the number of tokens from the first item to the last question."""
    return {"recall": (pair_tokens + 1) * items - 1 + distance, "needle": distance + 2, "copy": distance + items}[task]


class LongRangeData(RowLoaders):
    """A data module of a task whose answers are `distance` or more tokens before their questions.

    A model that attends to fewer tokens back is right with a probability of 1 / `answers`: answers are sampled
    independently and uniformly, and no token between an answer and its question carries information about it.  Only
    questions have a target, and `unigram_bits` is log2(`answers`).  The model must be causal, because in "copy" the
    tokens after a question contain its answer.

    - "recall": `items` pairs of a key and an answer; later the keys are repeated in another order, and the target of
      each is its answer.  With `pair_tokens=1` a pair is one token, and a single layer of attention can solve the task.
      With 2, a pair is the key and then the answer, which takes two layers, and many more training steps.
    - "needle": a mark and an answer among other answers; later the mark is repeated, and its target is the answer.
    - "copy": `items` answers; later a mark and the answers are repeated, and the target of each is the next answer.

    All other tokens are blank, and the task begins at a random position in the row.

    Args:
        task: "recall", "needle" or "copy".
        tokens: number of tokens in a row.
        distance: tokens from an answer to its question: at least so many in "recall", exactly in "needle" and "copy".
        batch_size: rows of a batch, on each rank or each group of ranks that share sequences.
        answers: number of different answers.
        items: number of answers in a row, in "recall" and "copy".
        pair_tokens: tokens of a pair in "recall", 1 or 2.
        samples: number of training rows, which are the same in each epoch.
        validation_samples: number of validation rows, sampled with another seed than the training rows.
        seed: seed of the rows and of their order.
        num_workers: worker processes of each rank that make rows ahead; 0 makes them in the process of the rank.
        pin_memory: puts batches in pinned memory, from which copies to a GPU are faster.
        read_parts: where ranks share sequences, the samples of each hold only its own tokens.  With False they are
            whole rows, which the strategy splits.
    """

    def __init__(
        self,
        task: Task = "recall",
        tokens: int = 1024,
        distance: int = 768,
        batch_size: int = 8,
        answers: int = 8,
        items: int = 8,
        pair_tokens: int = 1,
        samples: int = 100_000,
        validation_samples: int = 256,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
        read_parts: bool = True,
    ) -> None:
        super().__init__(tokens, batch_size, seed, num_workers, pin_memory, read_parts)
        if task not in get_args(Task):
            raise ValueError(f"task must be one of {', '.join(map(repr, get_args(Task)))}, got {task!r}")
        check_positive(distance=distance, items=items, samples=samples, validation_samples=validation_samples)
        check_positive(answers=answers)
        if answers < 2:
            raise ValueError(f"answers must be at least 2, got {answers}")
        if pair_tokens not in (1, 2):
            raise ValueError(f"pair_tokens must be 1 or 2, got {pair_tokens!r}")
        items = 1 if task == "needle" else items
        if task == "copy" and distance < items:
            raise ValueError(f"distance must be at least the {items} items of a copy, got {distance}")
        if (span := spanned(task, distance, items, pair_tokens)) > tokens:
            raise ValueError(
                f"tokens must be at least {span:,} for this task and distance {distance:,}, got {tokens:,}"
            )
        self.task, self.distance, self.answers, self.items = task, distance, answers, items
        self.pair_tokens = pair_tokens
        self.samples, self.validation_samples = samples, validation_samples
        self.chance, self.unigram_bits = 1 / answers, math.log2(answers)

    @property
    def vocab_size(self) -> int:
        return len(self._vocabulary)

    @property
    def _vocabulary(self) -> list[str]:
        answers = [f"a{i}" for i in range(self.answers)]
        keys = [f"k{i}" for i in range(self.items)] if self.task == "recall" else []
        pairs = [key + answer for key in keys for answer in answers] if self.pair_tokens == 1 else []
        return [".", "?", *answers, *keys, *pairs]

    def encode(self, text: str) -> Tensor:
        numbers = {word: number for number, word in enumerate(self._vocabulary)}
        if unknown := [word for word in text.split() if word not in numbers]:
            raise ValueError(f"text must be words of {' '.join(numbers)}, got {unknown[0]!r}")
        return torch.tensor([numbers[word] for word in text.split()], dtype=torch.int64)

    def decode(self, ids: Tensor) -> str:
        words = self._vocabulary
        return " ".join(words[i] if i < len(words) else UNKNOWN for i in ids.tolist())

    def setup(self, stage: str) -> None:
        task = self.task, self.tokens, self.distance, self.answers, self.items, self.pair_tokens
        self.train_rows = LongRangeRows(*task, self.samples, "train", self.seed)
        self.val_rows = LongRangeRows(*task, self.validation_samples, "validation", self.seed)
