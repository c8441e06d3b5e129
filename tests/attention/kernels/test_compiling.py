"""Marks for the compiler: the same as torch's own, without importing the compiler."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_longnet.attention.kernels.compiling import constant_result, not_compiled

ROOT = Path(__file__).parents[3]


def test_the_package_imports_no_compiler():
    """It takes longer to import than all of the package."""
    code = (
        "import sys, lightning_longnet.attention, lightning_longnet.sequence, lightning_longnet.models.longvit\n"
        "print({'torch._dynamo', 'sympy', 'lightning', 'torchmetrics'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert result.stdout == "set()\n", result.stderr


@pytest.mark.long
def test_calls_forward_and_backward_import_no_compiler():
    """Optimizers of torch and its `checkpoint` do."""
    code = (
        "import sys, torch\n"
        "from lightning_longnet import LongNet, LongNetConfig, Pattern\n"
        "pattern = Pattern.dilated((16, 32), (1, 2), is_causal=True)\n"
        "model = LongNet(LongNetConfig(pattern, dim=16, layers=1, heads=2))\n"
        "tokens = torch.randint(256, (2, 41))\n"
        "model(tokens[:, :-1], tokens[:, 1:]).loss_sum.backward()\n"
        "model.generate(tokens, 2)\n"
        "print({'torch._dynamo', 'sympy', 'lightning', 'torchmetrics'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert result.stdout == "set()\n", result.stderr


def test_a_constant_result_is_marked_as_torch_marks_it():
    def ours():
        return 1

    def theirs():
        return 1

    assert vars(constant_result(ours)) == vars(torch.compiler.assume_constant_result(theirs)) != {}
    assert constant_result(ours) is ours


def test_a_graph_breaks_at_what_is_not_compiled():
    seen = []

    @not_compiled
    def uncompiled(x):
        """A docstring."""
        seen.append(torch.compiler.is_compiling())
        return x * 2

    def call(x):
        return uncompiled(x + 1) + 1

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    x = torch.arange(3.0)
    torch.testing.assert_close(torch.compile(call, backend=backend)(x), call(x))
    assert seen == [False, False]
    assert len(graphs) == 2, "one before the function, and one after it"
    assert (uncompiled.__name__, uncompiled.__doc__) == ("uncompiled", "A docstring.")
