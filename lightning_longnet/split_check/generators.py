"""The random generators of a step: seeded for a run, restored after it, and compared between runs."""

from __future__ import annotations

import random
import sys
import zlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the generators of Python, NumPy and torch inside the block, and restore them after it.

    NumPy's is left out if the program has not imported NumPy, and torch's of CUDA if `device` is the CPU.  `Runner.run`
    enters it around a step.
    """
    numpy: Any = sys.modules.get("numpy")
    states = random.getstate(), None if numpy is None else numpy.random.get_state()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        random.seed(seed)
        torch.manual_seed(seed)
        if numpy is not None:
            numpy.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            if numpy is not None:
                numpy.random.set_state(states[1])


class OwnGenerators:
    """The random generators of torch, Python and NumPy that a module and those inside it keep as attributes.

    `Runner.run` makes it for the copy that a step runs on, and calls `seed` before and `draws` after the step.
    """

    def __init__(self, module: nn.Module) -> None:
        self._generators = [value for each in module.modules() for value in each.__dict__.values() if _is_one(value)]

    def seed(self, seed: int) -> None:
        """Seed them all; with seed 0 they stay as they are, as a copy of a module has the states of the module."""
        for generator in self._generators if seed else ():
            if isinstance(generator, torch.Generator):
                generator.manual_seed(seed)
            elif isinstance(generator, random.Random):
                generator.seed(seed)
            else:
                bits = generator.bit_generator
                bits.state = type(bits)(seed).state

    def draws(self, device: torch.device) -> int:
        """Return a hash of the states of these generators and of those of the process.

        Two runs with the same seed give the same hash if they drew equally many numbers.
        """
        numpy: Any = sys.modules.get("numpy")
        states = [_state(generator) for generator in self._generators]
        states += [random.getstate(), torch.get_rng_state().tolist()]
        if numpy is not None:
            name, words, *rest = numpy.random.get_state()
            states.append((name, words.tolist(), rest))
        if device.type == "cuda":
            states.append(torch.cuda.get_rng_state(device).tolist())
        return zlib.crc32(repr(states).encode())


def _is_one(value: Any) -> bool:
    """Return whether a value is a random generator."""
    numpy: Any = sys.modules.get("numpy")
    return isinstance(value, (torch.Generator, random.Random)) or (
        numpy is not None and isinstance(value, numpy.random.Generator)
    )


def _state(generator: Any) -> Any:
    """Return the state of a generator as values whose `repr` shows all of it."""
    if isinstance(generator, torch.Generator):
        return generator.get_state().tolist()
    return generator.getstate() if isinstance(generator, random.Random) else repr(generator.bit_generator.state)
