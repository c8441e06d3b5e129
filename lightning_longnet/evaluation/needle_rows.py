"""Rows in which something far back must be recalled: a number in a text, or the token after a mark."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Generator, Tensor

    from lightning_longnet.data.tokenizers import Tokenizer


class NeedleRow(NamedTuple):
    """A row and its answer.

    Attributes:
        prompt: (N,), the tokens of the row, which ends with the question.
        answer: (n,), the tokens that the row should be continued by.
        candidates: (c,), the tokens among which the answer must be the likeliest; None takes the whole vocabulary.
    """

    prompt: Tensor
    answer: Tensor
    candidates: Tensor | None = None


class NumberInText:
    """Texts with a sentence that says a number, which the question at their end asks for.

    An answer is right if the tokens of the number are the likeliest: then greedy decoding gives the number.

    Args:
        tokenizer: the tokenizer of the model.
        haystack: the text in which the sentence is, repeated where it is too short; by default plain sentences in a
            random order.
        begin: tokens before each row.
    """

    chance = 1e-5  # five digits

    def __init__(self, tokenizer: Tokenizer, haystack: str | None = None, begin: Sequence[int] = ()) -> None:
        if haystack is not None and not haystack.strip():
            raise ValueError("haystack must hold text, got none")
        self.tokenizer, self.haystack, self.begin = tokenizer, haystack, list(begin)
        digest = sha256((haystack or "").encode()).hexdigest()
        self.identity: list[Any] = ["text", tokenizer.name, digest, *self.begin]

    def row(self, length: int, depth: float, generator: Generator) -> NeedleRow:
        """Return a row of `length` tokens with the sentence at a depth from 0 to 1."""
        name = _NAMES[int(torch.randint(len(_NAMES), (), generator=generator))]
        number = int(torch.randint(10_000, 100_000, (), generator=generator))
        question = f"\nThe secret number of {name} is"
        encode = self.tokenizer.encode
        alone, joint = encode(question), encode(f"{question} {number}")
        # a tokenizer may join the end of the question with what follows
        shared = next((i for i, (a, b) in enumerate(zip(alone, joint, strict=False)) if a != b), len(alone))
        needle = encode(f"{question} {number}.\n")
        room = length - len(self.begin) - len(needle) - shared
        if room < 0:
            raise ValueError(
                f"lengths must be at least {length - room}, the tokens of the sentence and of the question, got "
                f"{length}"
            )
        text, place = self._text(room, generator), round(depth * room)
        prompt = [*self.begin, *text[:place], *needle, *text[place:], *joint[:shared]]
        return NeedleRow(torch.tensor(prompt), torch.tensor(joint[shared:]))

    def _text(self, room: int, generator: Generator) -> list[int]:
        """Return so many tokens of the haystack."""
        tokens: list[int] = []
        start = int(torch.randint(len(self.haystack or " "), (), generator=generator))
        while len(tokens) < room:
            if self.haystack is None:
                order = torch.randperm(len(_SENTENCES), generator=generator).tolist()
                piece = "".join(f"{_SENTENCES[i]} " for i in order)
            else:
                piece = self.haystack[start : start + _PIECE]
                start = (start + _PIECE) if start + _PIECE < len(self.haystack) else 0
            tokens += self.tokenizer.encode(piece)
        return tokens[:room]


class TokenAfterMark:
    """Rows of random tokens, in which the token after a mark is to be recalled where the mark is repeated.

    The mark and the possible answers are drawn for each row, and are in no other place of it.  A model that does not
    attend to the answer is right with a probability of 1 / `answers`.

    Args:
        vocab_size: the number of tokens to draw from.
        answers: the number of possible answers, of which the right one must be the likeliest.
    """

    def __init__(self, vocab_size: int, answers: int = 8) -> None:
        if not 2 <= answers <= vocab_size - 2:
            raise ValueError(f"answers must be from 2 to vocab_size - 2 = {vocab_size - 2}, got {answers}")
        self.vocab_size, self.answers = vocab_size, answers
        self.chance = 1 / answers
        self.identity: list[Any] = ["tokens", vocab_size, answers]

    def row(self, length: int, depth: float, generator: Generator) -> NeedleRow:
        """Return a row of `length` tokens with the answer at a depth from 0 to 1."""
        if length < 4:
            raise ValueError(f"lengths must be at least 4, got {length}")
        drawn = torch.randperm(self.vocab_size, generator=generator)
        mark, candidates, others = drawn[0], drawn[1 : 1 + self.answers], drawn[1 + self.answers :]
        prompt = others[torch.randint(len(others), (length,), generator=generator)]
        answer = candidates[torch.randint(self.answers, (1,), generator=generator)]
        place = round(depth * (length - 3))
        prompt[place], prompt[place + 1], prompt[-1] = mark, answer[0], mark
        return NeedleRow(prompt, answer, candidates)


_PIECE = 4096  # characters of a haystack that are encoded at once
_NAMES = (
    *("Lisbon", "Nairobi", "Oslo", "Quito", "Hanoi", "Tunis", "Cairo", "Lima"),
    *("Dublin", "Accra", "Sofia", "Manila", "Ottawa", "Kigali", "Riga", "Dakar"),
)
_SENTENCES = (
    "The road follows the river for a while and then climbs into the hills.",
    "Most of the shops open at nine, but the bakery on the corner opens before dawn.",
    "After the rain the air was clear, and one could see the mountains in the north.",
    "She had read the letter twice before she put it back into the drawer.",
    "The train was late again, so the passengers waited under the roof of the station.",
    "In spring the fields turn green within a few days.",
    "He repaired the old clock with a piece of wire and a little oil.",
    "The library keeps the newspapers of the last century in its cellar.",
    "A narrow path leads from the village to the lake.",
    "The children built a small dam of stones and mud.",
    "Every evening the boats return to the harbour with the tide.",
    "The museum shows tools that farmers used before there were engines.",
    "It takes about an hour to walk around the island.",
    "The wind had torn a branch from the tree in front of the school.",
    "They moved the table to the window, where the light was better.",
    "Nobody remembered who had planted the roses along the wall.",
    "The soup should simmer slowly until the vegetables are soft.",
    "From the tower one hears the bells of the other churches.",
    "The engineer drew a line on the map and explained where the bridge would be.",
    "In winter the pass is closed, and the post comes only once a week.",
    "The cat slept on the warm stones beside the door.",
    "A good map shows not only the roads but also the wells.",
    "The orchestra tuned its instruments while the hall was filling.",
    "By noon the market was empty, and the traders packed their boxes.",
)
