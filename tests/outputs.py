"""What a page says that a program prints, beside what it prints."""

import re

import pytest

NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")
TOLERANCE = 0.05  # of numbers with a decimal point, which differ between machines and versions


def assert_shown(expected, shown):
    """Lines of `shown` end in the lines of `expected`, one after the other; other lines may be where that has `...`."""
    lines, may_skip, at = shown.splitlines(), False, 0
    for line in expected.splitlines():
        if line.strip() == "...":
            may_skip = True
            continue
        reach = len(lines) if may_skip else at + 1
        result = [place for place in range(at, min(reach, len(lines))) if is_alike(line, lines[place])]
        assert result, f"{line!r} is not shown in its place in:\n{shown}"
        may_skip, at = False, result[0] + 1
    assert may_skip or not "".join(lines[at:]).strip(), f"the page does not show {lines[at:]}"


def is_alike(expected, line):
    """Whether a line ends in the expected one, apart from small differences of numbers."""
    pattern = NUMBER.pattern.join(f"(?:{re.escape(words)})" for words in NUMBER.split(expected.strip()))
    result = re.search(pattern.replace(NUMBER.pattern, f"({NUMBER.pattern})") + r"\s*$", line)
    return result is not None and all(map(_is_close, NUMBER.findall(expected), result.groups()))


def _is_close(expected, number):
    if "." not in expected:
        return expected == number
    values = [float(each.replace(",", "")) for each in (expected, number)]
    return values[1] == pytest.approx(values[0], rel=TOLERANCE)
