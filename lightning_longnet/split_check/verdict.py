"""The verdict of a split check, and its messages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from lightning_longnet.split_check.outcome import BUFFER, GRADIENT, RESULT

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from lightning_longnet.split_check.locate import Place

Kind = Literal["equal", "different", "inconclusive", "not checked"]

_WITHOUT_A_PLACE = {
    "gradient": "\nAll modules compute the same, and so the backward pass differs.  Likely cause: a collective without "
    "a gradient, or a detached tensor.  Instead: use gather_sequence(x) or sum_parts(x) of sequence_context(self).",
    "result": "\nAll modules compute the same, and so the step makes other results of it.  Instead: return the rows "
    "of this rank's tokens, or what sum_parts(x) or gather_sequence(x) of sequence_context(self) makes of them.",
    "number": "\nAll modules compute the same, and so the step makes another loss of it.  Likely cause: a sum over the "
    "tokens of this rank, where engines average over ranks.  Instead: return "
    "sequence_context(self).token_mean(loss_sum, token_count).",
}
DROPOUT = (
    "the step calls torch.nn.functional.dropout itself, which drops the same elements of the part of each rank that "
    "shares a sequence.  Instead: use nn.Dropout, or sequence_context(self).dropout(x, p, self.training)."
)
_PAGE = "docs/modules.md shows what is safe.  split_check='warn' goes on, 'off' does not look."


@dataclass(frozen=True)
class Verdict:
    """The result of a split check.

    Attributes:
        kind: "equal", "different", "not checked", or "inconclusive" where a difference may have a good reason: random
            numbers, rounding, or a length that the real ones do not have.
        message: one line for "equal" and "not checked"; else what differs, where, and what to do.
        error: the largest relative difference of the loss or of a gradient; None where nothing was compared.
        place: where it begins, for "different".
        drops_directly: whether the step calls torch's dropout functions itself; see `DROPOUT`.
        side_effects: for "equal", logged numbers and buffers that differ, and by how much; no gradient depends on them.
        refusal: for "not checked", why this package refuses parts in the step, where it does.
    """

    kind: Kind
    message: str
    error: float | None = None
    place: Place | None = None
    drops_directly: bool = False
    refusal: str = ""
    side_effects: Mapping[str, float] = field(default_factory=dict)


def not_checked(reason: str, refusal: str = "") -> Verdict:
    """Return the verdict "not checked", for a reason that its message is.

    `check_split` calls it where nothing can be compared, and a `Comparison` where a step returns nothing to compare.

    Args:
        reason: why nothing was compared.
        refusal: the ValueError of this package in the step, if that was the reason.
    """
    return Verdict("not checked", reason, refusal=refusal)


def equal(ranks: int, tokens: int | None, error: float) -> Verdict:
    """Return the verdict "equal", with the largest relative error; `Comparison.verdict` ends with it.

    Args:
        ranks: the number of ranks that share a sequence.
        tokens: the number of tokens of the sequences; None if the model makes them.
        error: the largest relative difference.
    """
    size = "" if tokens is None else f" at {tokens} tokens"
    return Verdict("equal", f"checked{size}: {ranks} ranks equal one process, to {max(error, 1e-16):.0e}", error)


def different(ranks: int, error: float, what: str, place: Place | None) -> Verdict:
    """Return the verdict "different"; `Comparison.verdict` ends with it, once it has looked for the place.

    Args:
        ranks, error: those of `equal`.
        what: the name of what differs by the error.
        place: the module in which it begins; None if no module differs.
    """
    kind = "gradient" if what.startswith(GRADIENT) else "result" if what.startswith(RESULT) else "number"
    where = f"\n{place}" if place is not None else _WITHOUT_A_PLACE[kind]
    message = (
        f"the module computes something else on parts of sequences than on whole ones: "
        f"{shown(ranks, error, what)}.{where}\n{_PAGE}"
    )
    return Verdict("different", message, error, place)


def inconclusive(reason: str, ranks: int, error: float, what: str, place: Place | None = None) -> Verdict:
    """Return the verdict "inconclusive": a difference that may have a good reason, `reason`.

    A `Comparison` calls it for rounding and random numbers, and `_confirmed` of check.py for a length.  The other
    arguments are those of `different`.
    """
    where = "" if place is None else f"\n{place}"
    message = f"the split check is inconclusive, as {reason}: {shown(ranks, error, what)}.{where}"
    return Verdict("inconclusive", message, error, place)


def side_effect(ranks: int, error: float, what: str, module: nn.Module) -> str:
    """Return the warning about a logged number or a buffer that differs, on which no gradient depends.

    `check_split` warns with it, on rank 0, for each of the verdict's `side_effects`.

    Args:
        ranks, error, what: those of `different`.
        module: the module, for the class of the one that holds the buffer.
    """
    if what.startswith(BUFFER):
        owner = what.removeprefix(BUFFER).rpartition(".")[0]
        where = f"{what} of {owner or 'the module'} ({type(module.get_submodule(owner)).__name__})"
        cause = "The step updates it with the tokens of a rank alone.  Instead: update it with "
        advice = "sequence_context(self).sum_parts(...), or leave it if each rank is to have its own."
    else:
        where, cause = what, "It is of the tokens of a rank alone.  Instead: log "
        advice = (
            "sequence_context(self).token_mean(loss_sum, token_count), or a sum with reduce_fx='sum', sync_dist=True."
        )
    return f"{shown(ranks, error, where)}; the loss and the gradients are right.  {cause}{advice}"


def parted(fault: str) -> Verdict:
    """Return the verdict "different" for a step on parts in which a rank waited for others that had ended it.

    Args:
        fault: the error of the rank that waited.
    """
    message = (
        f"the ranks part in the step: one waits for a message of others, which have ended their step without it "
        f"({fault}).  Likely cause: a rank skips what communicates, attention or token_mean for instance, as no token "
        f"of its part has a label.  Instead: let all ranks call it; token_mean takes a sum of 0 and a count of 0.\n"
        f"{_PAGE}"
    )
    return Verdict("different", message, float("inf"))


def shown(ranks: int, error: float, what: str) -> str:
    """Return a clause for messages: what differs from one process, on how many ranks, and by how much."""
    if error >= 1e-6:
        size = f"{error:.1%}" if error >= 0.001 else f"{100 * error:.1g}%"
    else:
        size = f"a share of {error:.0e}"
    return f"{what} on {ranks} ranks differs by {size} from that of one process"
