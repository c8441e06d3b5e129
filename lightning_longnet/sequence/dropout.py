"""The seeds of dropout in a context, and dropout of activations where each rank drops other elements of its tokens."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from lightning_longnet.attention.kernels.compiling import not_compiled
from lightning_longnet.attention.kernels.dropout import splitmix64
from lightning_longnet.sequence.position import Positioned

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

    from lightning_longnet.sequence.splitter import BatchSplitter

_CALLS = -1  # `of_activations` adds it to the seed of a step, in the place of a layer's number


class DropoutSeeds:
    """The seeds of dropout: functions of the step where one was begun, otherwise drawn from torch's CPU generator.

    A `SequenceContext` has one.
    """

    def __init__(self) -> None:
        self._step: Tensor | None = None  # the seed of the step
        self._generator: torch.Generator | None = None  # the generator of `of_activations` in the step
        self._calls: dict[int, Tensor] = {}  # the seeds of all ranks for each call of `of_activations` in the step

    def begin(self, seed: int, number: int | None) -> None:
        """Begin the step of this number, or end the one that was begun where it is None.

        `ContextDropout.begin_step` calls it with the `seed` of the context.
        """
        self._calls.clear()
        self._step = None if number is None else splitmix64(splitmix64(torch.tensor(seed)) + number)
        self._generator = None

    def of_layer(self, layer: int) -> Tensor | None:
        """Return the seed of attention dropout for the layer of this number in the current step, equal on all ranks.

        It is a 0-dimensional int64 tensor on the CPU; None where no step was begun, so that the caller draws a seed.
        `ContextAttention.attend_options` asks for each call of attention with dropout.
        """
        return None if self._step is None else splitmix64(self._step + layer)

    def of_activations(self, rank: int, ranks: int) -> int:
        """Return the seed for one call of dropout of activations on rank `rank` of `ranks`; that of each rank differs.

        All ranks call it together, by `ContextDropout.random_part` and `one_call`.  Every call draws `ranks` numbers
        from torch's CPU generator, so that it stays equal on all ranks.  Outside of a step these are the seeds.  In a
        step the seeds come from a generator of the step, so that a resumed run repeats them.  Activation checkpointing
        restores torch's generator before it recomputes, so the recomputation draws the same numbers again: the first of
        them is the key under which the seeds of the call are cached.
        """
        drawn = torch.randint(2**62, (ranks,), device="cpu")
        if self._step is not None:
            call = int(drawn[0])
            if self._generator is None:
                self._generator = torch.Generator().manual_seed(int(splitmix64(self._step + _CALLS)))
            if call not in self._calls:
                self._calls[call] = torch.randint(2**62, (ranks,), generator=self._generator, device="cpu")
            drawn = self._calls[call]
        return int(drawn[rank])

    @contextmanager
    def one_call(self) -> Iterator[None]:
        """Keep the generators equal on all ranks where some call `of_activations` more often inside the block.

        After the block they are as after one call.  `ContextDropout.chunks_as_one` uses it.
        """
        seed, outer = self.of_activations(0, 1), self._generator
        self._generator = None if self._step is None else torch.Generator().manual_seed(seed)
        try:
            with seeded(torch.device("cpu"), seed):
                yield
        finally:
            self._generator = outer


class ContextDropout(Positioned):
    """The part of `SequenceContext` that begins steps, drops activations, and has the seeds of attention dropout.

    Attributes:
        seed: the seed of dropout in steps.
    """

    seed: int
    _seeds: DropoutSeeds
    _splitter: BatchSplitter

    def begin_step(self, number: int | None) -> None:
        """Begin the step of a micro-batch; None ends the step.

        The strategy calls it before each step of the module, the split check before each of its own, and a training
        loop without the strategy before each forward.  In a step, what attention drops, and what dropout drops of a
        batch that is split, is a function of `seed` and the number, so that a run that is resumed repeats it.  Outside
        of steps every call draws a seed from torch's CPU generator; ranks that share a sequence use the seed of the
        first of them.  `torch.manual_seed` repeats it, and so does the recomputation of activations.

        Args:
            number: any integer.  The strategy takes the number of the micro-batch since training began, and negative
                numbers in evaluation.
        """
        self._seeds.begin(self.seed, number)

    def dropout(self, x: Tensor, p: float = 0.5, training: bool = True, *, is_part: bool | None = None) -> Tensor:
        """Return `torch.nn.functional.dropout(x, p, training)`, where each rank drops other elements of its tokens.

        `FeedForward` and modules of users call it in place of torch's function, on all ranks together.  Ranks that
        share a sequence have equal random states, so that a layer that is left out at random is left out on all of
        them.  The function of torch therefore drops the same elements of each part.  Modules of torch, such as
        `nn.Dropout`, do as this method does if the context was attached to them.

        Args:
            x: a tensor of any shape.
            p: the probability that an element is dropped.
            training: False returns x as it is.
            is_part: whether x holds this rank's tokens, and not what all ranks hold alike; `holds_part` by default.
        """
        if not (training and p > 0 and self._splitter.is_split):
            return F.dropout(x, p, training)
        dropped: Tensor = self._dropped_part(x, p, is_part)
        return dropped

    def holds_part(self, x: Tensor) -> bool:
        """Return whether x, (..., features), holds this rank's tokens in a split batch, and not what all ranks share.

        Its shape decides: a dimension before the last has the size L of this rank's part, and none has the size N of
        whole sequences.  Dropout needs to know it: of what all ranks share they must drop the same elements.  `dropout`
        asks, and feed-forwards that are computed in chunks ask before, as the shape of a chunk does not show it.
        """
        return self.holds_part_of(x.shape[:-1])

    def holds_part_of(self, dims: Sequence[int]) -> bool:
        """Return what `holds_part` returns, for a tensor whose dimensions without that of features have these sizes.

        The hooks on dropout modules of torch ask (dropout_hooks.py).
        """
        splitter = self._splitter
        return splitter.is_split and splitter.local_length in dims and splitter.current.length not in dims

    @not_compiled
    def _dropped_part(self, x: Tensor, p: float, is_part: bool | None) -> Tensor:
        """Return the dropout of x with the generator of `random_part`; `torch.compile` breaks the graph here."""
        with self.random_part(x.device, self.holds_part(x) if is_part is None else is_part):
            return F.dropout(x, p)

    def chunks_as_one(self) -> AbstractContextManager[None]:
        """Return a context manager for a layer that computes its tokens in chunks and drops elements of each chunk.

        Ranks with more tokens may have more chunks, and so draw more random numbers: after the block the random states
        of all ranks are equal again.  All ranks of the sequence group enter it, also those with a single chunk:
        `FeedForward.forward`, and `_forward_in_chunks` for models of transformers.
        """
        return self._seeds.one_call() if self._splitter.is_split else nullcontext()

    def random_part(self, device: torch.device, is_part: bool) -> AbstractContextManager[None]:
        """Return a context manager in which torch's generator of a device draws other numbers on each rank.

        After the block the generator continues as if unused.  All ranks call it together, around each dropout:
        `dropout` does, and the hooks on dropout modules of torch.  With `is_part=False` ranks that share a sequence
        draw the same numbers.
        """
        size = self.sequence_parallel_size
        rank = self.data_parallel_rank * size + (self.sequence_parallel_rank if is_part else 0)
        return seeded(device, self._seeds.of_activations(rank, self.data_parallel_size * size))


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch's default generator of a device inside the block, and restore its state at the end.

    `random_part` does it around a dropout, and `one_call` around all chunks of a layer.
    """
    generator = _generator_of(device)
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


def _generator_of(device: torch.device) -> torch.Generator:
    """Return torch's default generator of a device."""
    if device.type == "cpu":
        return torch.default_generator
    backend = torch.get_device_module(device)
    index = backend.current_device() if device.index is None else device.index
    generator: torch.Generator = backend.default_generators[index]
    return generator
