"""The comparison of a step on whole sequences with the same step on parts, at one length and in one dtype."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from lightning_longnet.sequence.context import SequenceContext
from lightning_longnet.split_check.engine import EngineModule
from lightning_longnet.split_check.locate import place_of
from lightning_longnet.split_check.ranks import Groups, first_fault, from_first, gathered_objects, is_of_waiting
from lightning_longnet.split_check.refusals import Refusal, first_refusal, refusal_of
from lightning_longnet.split_check.replica import perturbed
from lightning_longnet.split_check.runs import moved, to_device
from lightning_longnet.split_check.sample import sample, with_fewer_labels
from lightning_longnet.split_check.verdict import Verdict, different, equal, inconclusive, not_checked, parted
from lightning_longnet.split_check.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning_longnet.split_check.locate import Place
    from lightning_longnet.split_check.outcome import Outcome
    from lightning_longnet.split_check.replica import Values
    from lightning_longnet.split_check.runs import Runner

_PERTURBATION = 0.1  # of each parameter: a gate that begins at zero would hide what is behind it
_NOISE = 10.0  # how many times the difference of two equal computations in another order is allowed
_RESOLUTION = 1e-3  # rounding that moves results by more would hide faults


class Comparison:
    """Compares the outcomes of a step on whole and on split sequences, at one length and in one dtype.

    `check_split` makes one for each length and dtype that it tries.  All ranks call each method together, and get the
    same.

    Args:
        runner: runs the step.
        values: the values of parameters and buffers.
        dtype: their dtype; None where it is the module's own.
        context: the context of the run.
        tokens: the length to which batches are cut; None for batches without sequences.
        length: the length of whole batches, whose placement the shorter ones get.

    Attributes:
        tokens: as given.
        ranks: the number of ranks that share a sequence.
        ran_whole: whether the step gave a result on whole sequences.
        refusal: the refusal of parts by this package on some rank.
    """

    def __init__(
        self,
        runner: Runner,
        values: Values,
        dtype: torch.dtype | None,
        context: SequenceContext,
        tokens: int | None,
        length: int | None,
    ) -> None:
        self.tokens, self.ranks, self.ran_whole = tokens, context.sequence_parallel_size, False
        self.refusal = Refusal()
        self._runner, self._given, self._dtype, self._context = runner, values, dtype, context
        self._values, self._batch = values, None  # type: tuple[Values, Any]
        self._placement = context.placement if length is None else context.kind_of(length)
        self._groups = Groups(context.position)
        self._refusal = Refusal()  # of the last attempt

    def close(self) -> None:
        """Destroy the process groups of the comparison."""
        self._groups.close()

    def verdict(self, batch: Any, fewer_labels: bool = False) -> tuple[Verdict | None, str]:
        """Return (verdict, ""), or (None, the error that a rank raised in the step).

        `_verdict` and `_verdict_at` of check.py call it, once with `fewer_labels`, and without if that raised an error.

        Args:
            batch: whole sequences, of which a piece of `tokens` tokens is taken.
            fewer_labels: whether the tokens of the first rank lose some of their labels, so that a plain mean over the
                labels of each rank is not the mean over all.
        """
        dims = self._runner.dims
        self._batch = to_device(sample(batch, dims, self.tokens), self._runner.device, self._dtype)
        if fewer_labels and self.tokens is not None:
            self._batch = with_fewer_labels(self._batch, dims, self.tokens // (2 * self.ranks))
        whole, fault = self._whole_of(_PERTURBATION)
        if whole is not None and not whole.is_finite:  # it may have made a root of something negative
            whole, fault = self._whole_of(0.0)
        if whole is None:
            return None, fault
        self.ran_whole = True
        if whole.is_empty:
            what = "tensor" if self._runner.predicts else "number"
            return not_checked(f"the step returns and logs no {what}"), ""
        if not whole.is_finite:
            return None, "the loss or a gradient of whole sequences is not finite"
        part, fault = self._attempt(self._parts)
        self.refusal = self._refusal
        if part is None:
            return (parted(fault), "") if is_of_waiting(fault) else (None, fault)
        if self._runner.predicts and not whole.numbers and not whole.has_comparable_results(part):
            return not_checked("no tensor that the step returns has the shape of a part, or that of one process"), ""
        return self._compared(whole, part), ""

    def _whole_of(self, size: float) -> tuple[Outcome | None, str]:
        """Return (outcome of whole sequences, ""), or (None, error), with parameters moved by `size` of themselves."""
        self._values = perturbed(self._given, size, seed=0, names=self._runner.replica.parameters)
        return self._attempt(self._whole)

    def _compared(self, whole: Outcome, part: Outcome) -> Verdict:
        """Return the verdict on the outcomes of whole and of split sequences.

        They are equal if they differ no more than rounding moves the outcome of whole ones.  Only if they differ more
        the step runs again, to measure rounding and chance, and to find the place.
        """
        error, what = from_first(whole.difference(part))
        least = _NOISE * max(self._ulp(), self._runner.replica.noise)  # of the tolerance, however little rounding moves
        if error <= min(least, _RESOLUTION) and max(whole.side_effects(part).values(), default=0.0) <= least:
            return equal(self.ranks, self.tokens, error)
        tolerance = max(least, _NOISE * self._noise(whole))
        if error <= tolerance:
            if error <= _RESOLUTION:
                return replace(
                    equal(self.ranks, self.tokens, error), side_effects=self._side_effects(whole, part, tolerance)
                )
            return inconclusive("rounding alone moves the results as much", self.ranks, error, what)
        drew_alike = whole.drew_like(part)
        is_random = self._is_random(whole, tolerance)
        (place, places_draw_alike), fault = self._attempt_to_locate(tolerance)
        if is_random and not (drew_alike and places_draw_alike and not fault):
            return inconclusive("the step draws random numbers", self.ranks, error, what, place)
        return different(self.ranks, error, what, place)

    def _ulp(self) -> float:
        """Return the rounding of the values, or that of float32, in which a step may compute some of it."""
        dtypes = {x.dtype for x in self._values.values() if x.is_floating_point()}
        return max(torch.finfo(dtype).eps for dtype in {*dtypes, torch.float32})

    def _noise(self, whole: Outcome) -> float:
        """Return by how much rounding moves the outcome of whole sequences: its change if all inputs move by an ulp."""
        ulp = self._ulp()
        values = perturbed(self._values, ulp, seed=1)
        for batch in (moved(self._batch, ulp), self._batch):  # a label of 1 may have to stay one
            other, _ = self._attempt(lambda batch=batch: self._run(values, batch, self._whole_context()))  # type: ignore[misc]
            if other is not None and other.is_finite:
                return max(ulp, float(from_first(whole.difference(other)[0])))
        return ulp

    def _side_effects(self, whole: Outcome, part: Outcome, tolerance: float) -> dict[str, float]:
        """Return by how much logged numbers and buffers of the two outcomes differ, by their names.

        Those that another run on whole sequences changes as much, as times and random numbers, are left out.
        """
        moved = whole.side_effects(part)
        moved = {name: size for name, size in moved.items() if size > tolerance}
        if not moved:
            return {}
        values = perturbed(self._values, 1e-7, seed=1)
        other, _ = self._attempt(lambda: self._run(values, self._batch, self._whole_context(), seed=1))
        if other is None:
            return {}
        by_chance = whole.side_effects(other)  # times and random numbers, and rounding
        return {name: size for name, size in moved.items() if size > _NOISE * by_chance.get(name, 0.0)}

    def _is_random(self, whole: Outcome, tolerance: float) -> bool:
        """Return whether another seed gives another outcome of whole sequences, or none."""
        other, _ = self._attempt(lambda: self._whole(seed=1))
        return other is None or from_first(whole.difference(other)[0]) > tolerance

    def _attempt_to_locate(self, tolerance: float) -> tuple[tuple[Place | None, bool], str]:
        """Return ((where parts begin to differ, or None; whether all runs draw random numbers alike), error or "")."""
        context, rank = self._part_context(), self._context.sequence_parallel_rank
        here = None if self.tokens is None else context.placement_of(self.tokens).lengths[rank]
        whole, part = Watch(self.tokens), Watch(here)
        for run in (
            lambda: self._whole(watch=whole.watching),
            lambda: self._run(self._values, self._batch, context, watch=part.watching),
        ):
            if fault := self._attempt(run)[1]:
                return (None, False), fault
        placement = None if context.length is None else context.placement_of(context.length)
        place: Place | None = from_first(place_of(whole, part, placement, rank, tolerance))
        return (place, all(gathered_objects(whole.draws == part.draws))), ""

    def _whole(self, seed: int = 0, watch: Any = None) -> Outcome:
        """Run the step on whole sequences, and return the outcome of this rank."""
        return self._run(self._values, self._batch, self._whole_context(), seed, watch)

    def _parts(self) -> Outcome:
        """Run the step on this rank's parts of the sequences, and return the outcome of this rank."""
        return self._run(self._values, self._batch, self._part_context())

    def _run(self, values: Values, batch: Any, context: SequenceContext, seed: int = 0, watch: Any = None) -> Outcome:
        """Return `Runner.run` of these arguments; the step sees as its world only the ranks that the run has.

        A sharded module keeps the world of the run, as FSDP2 and DeepSpeed may use the group of all ranks.
        """
        is_inside = isinstance(self._runner.replica, EngineModule)
        with nullcontext() if is_inside else self._groups.world(context.position):
            return self._runner.run(values, batch, context, seed, watch)

    def _whole_context(self) -> SequenceContext:
        """Return a context in which this rank computes whole sequences."""
        return SequenceContext(position=self._groups.whole, seed=self._context.seed)

    def _part_context(self) -> SequenceContext:
        """Return a context in which this rank computes its part of sequences; that of the run keeps its batch."""
        run = self._context
        return SequenceContext(
            placement=self._placement, exchange=run.exchange, seed=run.seed, position=self._groups.parts
        )

    def _attempt(self, run: Callable[[], Outcome]) -> tuple[Outcome | None, str]:
        """Call `run`; return (outcome averaged over all ranks, ""), or on all ranks (None, the error of one rank)."""
        outcome, fault, refusal, self._refusal = None, "", Refusal(), Refusal()
        try:
            outcome = run()
        except Exception as error:  # noqa: BLE001  a step may raise anything at a length or dtype that it is not made for
            text = str(error).strip()
            fault = f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
            refusal = refusal_of(error)
        if fault:
            self._groups.leave()
        if fault := first_fault(fault):
            self._refusal = first_refusal(refusal)
            self._groups.close()
            self._groups = Groups(self._context.position)
            return None, fault
        assert outcome is not None
        return outcome.averaged(), ""
