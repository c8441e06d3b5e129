"""Print the memory that a call of attention holds on a GPU, by the planner's ledger, for each kernel that is named.

    python tests/planning/held.py TOKENS HEAD_DIM KERNEL ...

The operators of the kernels run on fake tensors, which allocate what the true ones allocate between operators; what an
operator allocates inside is not seen.  Tensors pass for those of a GPU, since torch without CUDA slices none of its.
"""

import json
import sys
from contextlib import nullcontext
from math import prod
from pathlib import Path
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lightning_longnet import Pattern
from lightning_longnet.attention import op
from lightning_longnet.attention.kernels import activated, cudnn, flash, hub, sdpa
from lightning_longnet.attention.kernels.sdpa import cuda
from lightning_longnet.attention.kernels.sdpa import flash as torchs
from lightning_longnet.attention.kernels.triton import launch
from lightning_longnet.attention.spec import AttentionSpec
from lightning_longnet.planning.ledger import Ledger

WIDTH = 512  # of all heads


def package():
    """The flash-attn package, whose operators allocate their results alone."""

    def forward(q, *_, **__):
        return torch.empty_like(q), q.new_empty(len(q), q.shape[2], q.shape[1], dtype=torch.float32), None, None

    return SimpleNamespace(_flash_attn_forward=forward, _flash_attn_backward=lambda *_, **__: None)


def true_lists(parts, key, make=launch._make_launches):
    """The phases of parts, made of true numbers, with lists that the ledger sees allocated on the device."""
    with _disable_current_modes():
        made = make(parts, key)
    phases = []
    for phase, lists in made:
        held = {name: torch.empty(getattr(lists, name).shape, dtype=torch.int32) for name in ("items", "spans")}
        phases.append(launch._PhaseLaunch(phase, lists._replace(**held)))
    return tuple(phases)


def emulate():
    """Let the kernels take the tensors for those of a Hopper GPU."""
    torchs._capability = lambda device: (9, 0)
    sdpa._module_of = lambda q: cuda
    sdpa.takes_weights = lambda device: False
    cudnn._lse_dims = lambda device, dtype: 3
    activated.activated_implementation = lambda implementation: nullcontext()
    flash._interface = hub._interface = package
    launch._make_launches = true_lists
    launch._launch = lambda *_: None


def held(kernel, tokens, head_dim):
    """Return the peaks of forward and backward over q, k, v, out, their gradients and lse, with these counted."""
    segments = [min(2**n, tokens) for n in range(11, 16)]
    spec = AttentionSpec(Pattern.dilated(segments, (1, 2, 4, 8, 16), is_causal=True), kernel, head_dim**-0.5).dumps()
    ledger = Ledger({})
    with FakeTensorMode():
        given = [torch.empty(1, tokens, WIDTH // head_dim, head_dim, dtype=torch.bfloat16) for _ in range(4)]
        for x in given:
            ledger.knows(x)
        q, k, v, grad = given
        with ledger:
            ledger.phase = "forward"
            out, lse, _ = op.forward.body(q, k, v, None, None, None, None, spec, None)
            ledger.phase = "backward"
            result = op.backward.body(grad, q, k, v, out, lse, [], None, None, None, None, spec, None)
    whole = [*given, out, lse, *result[:3]]
    sizes = [prod(x.shape) * x.element_size() for x in whole]
    at, most = sum(sizes[:4]), {"forward": 0, "backward": 0}
    for event in ledger.events:
        at += event.bytes
        most[event.phase] = max(most[event.phase], at)
    return [most[phase] / sum(sizes) for phase in ("forward", "backward")]


if __name__ == "__main__":
    emulate()
    tokens, head_dim, *kernels = sys.argv[1:]
    print(json.dumps({kernel: held(kernel, int(tokens), int(head_dim)) for kernel in kernels}))
