"""`attn_implementation="ring"` is a name that transformers knows, in whichever order the two packages are imported."""

import subprocess
import sys

import pytest
from tiers import tiered

ORDERS = {
    "first": "import lightning_longnet\nimport transformers",
    "second": "import transformers\nimport lightning_longnet",
    "after a model": "import transformers\ntransformers.LlamaForCausalLM\nimport lightning_longnet",
    "between": "import transformers.masking_utils\nimport lightning_longnet\nimport transformers",
}
USE = """
config = transformers.LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                  num_attention_heads=2)
model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="ring")
import torch
print(model(torch.arange(9)[None]).logits.shape)
"""


@pytest.mark.parametrize("order", tiered(ORDERS, quick=[], full=["second", "after a model", "between"]))
def test_the_order_of_imports_does_not_matter(order):
    done = subprocess.run([sys.executable, "-c", ORDERS[order] + USE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 9, 9])" in done.stdout


def test_importing_the_package_imports_neither():
    code = "import sys, lightning_longnet\nprint({'torch', 'transformers', 'lightning'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
