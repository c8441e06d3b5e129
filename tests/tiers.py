"""The cases of a matrix that `make test` runs, and those that it leaves to `make test-long` or to `make test-full`."""

import pytest


def tiered(cases, quick, full=()):
    """The parameters of `pytest.mark.parametrize`: `quick` cases as they are, `full` ones marked so, the others `long`.

    A case is a value, or a tuple of values where the test has several arguments.
    """
    cases, quick, full = list(cases), list(quick), list(full)
    unknown = [case for case in (*quick, *full) if case not in cases]
    assert not unknown, f"{unknown} are no cases of {cases}"
    return [case if case in quick else _marked(case, "full" if case in full else "long") for case in cases]


def _marked(case, tier):
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=getattr(pytest.mark, tier))
