"""200 drawn calls of `attend` give what `tests/data/record_results.py` recorded, gradients included, to 1e-12."""

import pytest
from recorded import NAMES, cases, summaries
from tiers import tiered

CASES = cases()


def differing(listed, result):
    """Name each number that is not as it was recorded."""
    for case, now in zip(listed, result, strict=True):
        options = {name: value for name, value in case.items() if name != "results"}
        assert list(now) == list(case["results"]), options
        for name, numbers in case["results"].items():
            # an lse begins with a count, and all end with the norm
            bounds = [1e-12 * max(1, numbers[-1])] * len(numbers)
            if name == "lse":
                bounds[0] = 0
            for which, (a, b, bound) in enumerate(zip(now[name], numbers, bounds, strict=True)):
                if not abs(a - b) <= bound:  # a NaN differs
                    yield f"{name}[{which}] is {a!r}, was {b!r}, of {options}"


@pytest.mark.parametrize("ranks", tiered(range(5), quick=[0, 3]))
def test_results_are_those_that_were_recorded(request, ranks):
    listed = [case for case in CASES if len(case["lengths"] or ()) == ranks]
    result = summaries(listed, lambda: request.getfixturevalue("pool"))
    assert not (wrong := list(differing(listed, result))), "\n".join([f"{len(wrong)} numbers differ", *wrong[:20]])


def test_the_recorded_calls_are_of_all_kinds():
    assert len(CASES) == 200
    kinds = [
        (case["lengths"] is not None, case["settings"].get("exchange"), case["settings"]["kernel"]) for case in CASES
    ]
    for exchange in ("auto", "gather", "ring", "swap", "local"):
        for kernel in ("auto", "eager", "sdpa"):
            assert (True, exchange, kernel) in kinds
    assert {kernel for is_split, _, kernel in kinds if not is_split} == {"auto", "sdpa", "eager", "reference"}
    assert {name for case in CASES for name in case["results"]} == set(NAMES)
