"""Synthetic tasks that are solved by seeing far back, and by nothing else."""

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
    """Rows of one task; what each holds depends on the seed and its number alone.

    See `LongRangeData` for the tasks and for what the arguments mean.
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

        def drawn(high: int, size: int) -> Tensor:
            return torch.randint(high, (size,), generator=generator)

        ids, labels = torch.full((self.tokens,), BLANK), torch.full((self.tokens,), IGNORED)
        first = int(drawn(self.tokens - self.span + 1, 1))
        answers = FIRST_ANSWER + drawn(self.answers, self.items)
        if self.task == "recall":
            order = torch.randperm(self.items, generator=generator)
            keys = FIRST_ANSWER + self.answers + order
            asked = torch.randperm(self.items, generator=generator)
            pairs = slice(first, first + self.pair_tokens * self.items)
            if self.pair_tokens == 2:
                ids[pairs] = torch.stack([keys, answers], 1).flatten()
            else:
                ids[pairs] = FIRST_ANSWER + self.answers + self.items + order * self.answers + answers - FIRST_ANSWER
            queries = slice(pairs.stop - 1 + self.distance, pairs.stop - 1 + self.distance + self.items)
            ids[queries], labels[queries] = keys[asked], answers[asked]
        elif self.task == "needle":
            ids[:] = FIRST_ANSWER + drawn(self.answers, self.tokens)
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
    """Tokens from the first of what is to be kept to the last that is asked."""
    return {"recall": (pair_tokens + 1) * items - 1 + distance, "needle": distance + 2, "copy": distance + items}[task]


class LongRangeData(RowLoaders):
    """A task whose answers are `distance` tokens back or farther: who does not see so far is right by chance.

    Chance is 1 / `answers`: each answer is drawn alone, all being equally likely, and no token that a question can see
    and that is nearer to it says anything of its answer.  Only tokens that ask have a target, and `unigram_bits` is
    log2(`answers`).  Models are causal: later tokens do tell the answers of a copy.

    - "recall": `items` pairs of a key and an answer; later on, in another order, each key asks for its answer.  A pair
      is one token, which a layer of attention finds by itself; as two tokens, the key and then the answer, it takes two
      layers that work together, and far more steps until they do.
    - "needle": one answer behind a mark, in a row of other answers; later on a mark asks for it.
    - "copy": `items` answers; later on they are to be repeated in their order, each when the one before it is shown.

    Whatever is not needed is blank, and the whole begins anywhere in the row.

    Args:
        task: one of them.
        tokens: in a row.
        distance: tokens from an answer to the question for it, at least; exactly so many in "needle" and "copy".
        batch_size: rows of a step, on each rank or group of ranks that share sequences.
        answers: how many there are to choose from.
        items: what is to be kept, in "recall" and "copy".
        pair_tokens: tokens of a pair in "recall", 1 or 2.
        samples: training rows of an epoch; in each epoch the same.
        validation_samples: rows of validation, which no training row equals but by chance.
        seed: of the rows, and of their order.
        num_workers: processes of each rank that make rows ahead; 0 makes them when a batch is wanted.
        pin_memory: hand out batches in memory from which GPUs copy faster.
        read_parts: where ranks share sequences each is handed its own tokens alone; False: whole rows, which the
            strategy cuts.
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
        return len(self._words)

    @property
    def _words(self) -> list[str]:
        answers = [f"a{i}" for i in range(self.answers)]
        keys = [f"k{i}" for i in range(self.items)] if self.task == "recall" else []
        pairs = [key + answer for key in keys for answer in answers] if self.pair_tokens == 1 else []
        return [".", "?", *answers, *keys, *pairs]

    def encode(self, text: str) -> Tensor:
        numbers = {word: number for number, word in enumerate(self._words)}
        if unknown := [word for word in text.split() if word not in numbers]:
            raise ValueError(f"text must be words of {' '.join(numbers)}, got {unknown[0]!r}")
        return torch.tensor([numbers[word] for word in text.split()], dtype=torch.int64)

    def decode(self, ids: Tensor) -> str:
        words = self._words
        return " ".join(words[i] if i < len(words) else UNKNOWN for i in ids.tolist())

    def setup(self, stage: str) -> None:
        task = self.task, self.tokens, self.distance, self.answers, self.items, self.pair_tokens
        self.train_rows = LongRangeRows(*task, self.samples, "train", self.seed)
        self.val_rows = LongRangeRows(*task, self.validation_samples, "validation", self.seed)
