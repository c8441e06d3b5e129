"""docs/modules.md: in each pair of its examples the first is found by the split check, and the second is right."""

import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from faults import WIDTH, Base
from test_split_check import batch_of, connected
from torch import nn

from lightning_longnet import check_split

PAGE = Path(__file__).parents[2] / "docs/modules.md"


def examples():
    """(the imports of the page, [(is it right, code)])"""
    begin, *blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    return begin, [("# right" in block.splitlines()[0], block) for block in blocks]


class Example(Base):
    """A module with a layer or a loss of the page in it."""

    def __init__(self, code):
        names = {}
        exec(code, names)
        self.mixer_class, self.loss = names.get("Mixer"), names.get("loss")
        super().__init__()

    def build(self):
        self.mixer = nn.Identity() if self.mixer_class is None else self.mixer_class(WIDTH)

    def mixing(self, x):
        return self.mixer(x)

    def step(self, batch):
        return super().step(batch) if self.loss is None else self.loss(self, self.logits(batch), batch["labels"])


def verdicts(rank, world):
    context, result = connected(rank, world, 2), []
    begin, blocks = examples()
    for _, block in blocks:
        with redirect_stdout(None):
            module = Example(begin + block)
        result.append(check_split(module, lambda each, part: each.step(part), batch_of(0), context, action="warn"))
    return result


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:the module computes")
def test_wrong_examples_are_found_and_right_ones_are_not(trainers):
    _, blocks = examples()
    assert [is_right for is_right, _ in blocks] == [False, True] * (len(blocks) // 2)
    assert len(blocks) >= 18
    for (is_right, block), verdict in zip(blocks, trainers.run(2, verdicts)[0], strict=True):
        assert verdict.kind == ("equal" if is_right else "different"), (block, verdict)
