"""The cases of a matrix that `make test` runs, and those that it leaves to `make test-long` or to `make test-full`."""

from itertools import combinations

import pytest


def tiered(cases, quick, full=(), covers=None, long=None):
    """The parameters of `pytest.mark.parametrize`: `quick` cases as they are, `full` ones marked so, the others `long`.

    A case is a value, or a tuple of values where the test has several arguments.  With `covers=1` as many cases are
    long as are needed for every value of each argument to be in a case that is quick or long, and with `covers=2` for
    every pair of values of two arguments; all others are full.  With `long` these cases are long, and all others full.
    """
    cases, quick, full = list(cases), list(quick), list(full)
    assert long is None or not (full or covers), "`long` leaves all other cases to the full tier"
    long = None if long is None else list(long)
    unknown = [case for case in (*quick, *full, *(long or ())) if case not in cases]
    assert not unknown, f"{unknown} are no cases of {cases}"
    if covers is not None:
        kept = [*quick, *_covering(cases, quick, covers)]
        full = [case for case in cases if case not in kept]
    if long is not None:
        full = [case for case in cases if case not in (*quick, *long)]
    return [case if case in quick else _marked(case, "full" if case in full else "long") for case in cases]


def _covering(cases, taken, covers):
    """Return cases that have, with those taken, all combinations of so many values that any case has."""

    def combined(case):
        return set(combinations(enumerate(case), covers))

    missing = set().union(*map(combined, cases)).difference(*map(combined, taken))
    chosen = []
    while missing:
        chosen.append(max(cases, key=lambda case: len(combined(case) & missing)))
        missing -= combined(chosen[-1])
    return chosen


def _marked(case, tier):
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=getattr(pytest.mark, tier))
