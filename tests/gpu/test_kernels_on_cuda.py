"""Every kernel that serves on this CUDA device: on blocks, on whole calls, and in what surrounds them."""

import shutil

import drawn
import pytest
import torch
from compared import calls, close, compare_attention, compare_block, widened
from hypothesis import given, settings

from lightning_longnet import Pattern, attend, explain
from lightning_longnet.attention.kernels import BLOCK_KERNELS, kernel_names

pytestmark = pytest.mark.gpu

LONGNET = Pattern.dilated((64, 128, 512), (1, 2, 4), is_causal=True)
PATTERNS = {
    "longnet": LONGNET,
    "not causal": Pattern.dilated((100, 300), (1, 3)),
    "set": Pattern.dilated((64, 128, 512), (1, 2, 4), True, multiplicity="set"),
    "window": Pattern.window(70, True) + Pattern.dilated((512,), (4,), True),
    "broad window": Pattern.window(600),
    "dense": Pattern.dense(True),
}
# of the largest true value; memory-efficient attention makes float32 of three products in TF32
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
KERNELS = pytest.mark.parametrize("kernel", kernel_names())


@pytest.fixture(autouse=True)
def only_where_it_serves(request):
    """CuDNN and FA4 on Hopper have no deterministic backward; the others are tested with theirs."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    kernel, dtype = params.get("kernel"), params.get("dtype", torch.bfloat16)
    if kernel in ("cudnn", "flash4"):
        torch.use_deterministic_algorithms(False)
    try:
        if kernel is not None and (refusals := refusals_of(kernel, dtype)):
            pytest.skip("; ".join(refusals))
        yield
    finally:
        torch.use_deterministic_algorithms(True)


def refusals_of(kernel, dtype=torch.bfloat16, **conditions):
    x = torch.zeros(1, 8, 2, 64, dtype=dtype, device="cuda")
    verdicts = explain(x, x, x, Pattern.dense(), **conditions).verdicts
    return next(each.refusals for each in verdicts if each.kernel == kernel)


def takes_padding(kernel):
    return not refusals_of(kernel, key_padding_mask=torch.zeros(1, 8, dtype=torch.bool, device="cuda"))


@KERNELS
@DTYPES
@settings(max_examples=60, deadline=None)
@given(case=calls())
def test_every_block(kernel, dtype, case):
    block(kernel, dtype, case)


@KERNELS
@DTYPES
@settings(max_examples=60, deadline=None)
@given(case=calls(rows=400))
def test_every_block_of_several_tiles(kernel, dtype, case):
    block(kernel, dtype, case)


def block(kernel, dtype, case):
    if not hasattr(BLOCK_KERNELS.get(kernel), "forward"):
        pytest.skip("knows no blocks")
    shape, low, high, padding, seed = widened(case)
    case = shape, low, high, padding if takes_padding(kernel) else None, seed
    compare_block(BLOCK_KERNELS[kernel], case, dtype=dtype, tolerance=TOLERANCE[dtype] / 2, device="cuda")


@KERNELS
@DTYPES
@settings(max_examples=30, deadline=None)
@given(case=drawn.cases())
def test_equals_brute_force(kernel, dtype, case):
    *shape, dim = case["shape"]
    case = case | {"shape": (*shape, 8 * dim), "hidden": case["hidden"] if takes_padding(kernel) else None}
    compare_attention(case, kernel, dtype, TOLERANCE[dtype], device="cuda")


def compare(kernel, dtype, pattern, mix="exact", kv_heads=4, dropout=0.0, documents=None, hidden=None):
    """With the reference in float64, at 700 tokens."""
    tensors = [x.detach() for x in drawn.tensors((2, 700, 8, kv_heads, 64), dtype=dtype)]
    settings = {"mix": mix, "dropout": dropout, "dropout_seed": 3, "scale": 0.1}
    results = []
    for name, cast in ((kernel, dtype), ("reference", torch.float64)):
        q, k, v, grad = (x.to("cuda", cast) for x in tensors)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        conditions = {"documents": documents, "key_padding_mask": hidden}
        conditions = {key: None if x is None else x.cuda() for key, x in conditions.items()}
        out, lse = attend(*leaves, pattern, kernel=name, return_lse=True, **settings, **conditions)
        results.append((out, lse.nan_to_num(neginf=0), *torch.autograd.grad(out, leaves, grad)))
    for result, truth in zip(*results, strict=True):
        close(result, truth.cpu(), TOLERANCE[dtype])


@KERNELS
@DTYPES
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_patterns(kernel, dtype, pattern):
    compare(kernel, dtype, pattern)


@KERNELS
@DTYPES
@pytest.mark.parametrize("mix", ["exact", "detached"])
def test_documents(kernel, dtype, mix):
    lengths = torch.tensor([1, 2, 3, 3, 50, 51, 130, 200, 7, 7, 246])
    documents = torch.arange(len(lengths)).repeat_interleave(lengths)
    compare(kernel, dtype, LONGNET, mix, documents=documents)
    compare(kernel, dtype, PATTERNS["window"], mix, kv_heads=2, documents=documents)


@KERNELS
@DTYPES
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_grouped_heads(kernel, dtype, kv_heads):
    compare(kernel, dtype, LONGNET, kv_heads=kv_heads)


@KERNELS
@DTYPES
def test_padding(kernel, dtype):
    if not takes_padding(kernel):
        pytest.skip("has no padding masks")
    hidden = torch.arange(700).expand(2, 700) >= torch.tensor([[500], [700]])
    for pattern in PATTERNS.values():
        compare(kernel, dtype, pattern, hidden=hidden)
    compare(kernel, dtype, LONGNET, "detached", hidden=hidden.flip(1))


@DTYPES
def test_dropout(dtype):
    compare("eager", dtype, LONGNET, dropout=0.2)


@KERNELS
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_misaligned_rows(kernel, dtype):
    base = torch.randn(1, 130, 3, 67, dtype=dtype, device="cuda")
    x = base[:, 1:, :, 1:65].requires_grad_()
    result = attend(x, x, x, LONGNET, kernel=kernel)
    truth = attend(x, x, x, LONGNET, kernel="reference")
    close(result, truth.cpu(), TOLERANCE[dtype])
    grad = base[:, 1:, :, 2:66].detach()
    close(*(torch.autograd.grad(y, x, grad)[0].cpu() for y in (result, truth)), 2 * TOLERANCE[dtype])


@KERNELS
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_more_segments_than_a_grid_has_rows(kernel, dtype):
    if kernel == "reference":
        pytest.skip("would hold all N x N scores")
    q, k, v, grad = (torch.randn(1, 2**21, 1, 8, dtype=dtype, device="cuda").requires_grad_(i < 3) for i in range(4))
    out = attend(q, k, v, Pattern.dilated((2,), (1,)), scale=0.3, kernel=kernel)
    pairs = [x.float().unflatten(1, (-1, 2)).squeeze(3) for x in (q, k, v)]
    truth = ((pairs[0] @ pairs[1].mT * 0.3).softmax(-1) @ pairs[2]).flatten(1, 2).unsqueeze(2)
    close(out, truth.cpu(), TOLERANCE[dtype])
    for result, true in zip(
        torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(truth, (q, k, v), grad.float()), strict=True
    ):
        close(result, true.cpu(), TOLERANCE[dtype])


@KERNELS
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_nobody_waits_for_the_device(kernel, dtype):
    if kernel == "reference":
        pytest.skip("cuts samples apart")
    hidden = torch.arange(700, device="cuda").expand(1, 700) > 600 if takes_padding(kernel) else None
    q, k, v, grad = (x.detach().cuda() for x in drawn.tensors((1, 700, 4, 2, 64), dtype=dtype))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def step():
        out = attend(*leaves, LONGNET, key_padding_mask=hidden, kernel=kernel)
        torch.autograd.grad(out, leaves, grad)

    step()  # loads libraries, and fills what is kept
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_explain():
    x = torch.zeros(1, 8, 2, 64, dtype=torch.bfloat16, device="cuda")
    explained = explain(x, x, x, LONGNET)
    head, *rows = str(explained).splitlines()
    major, minor = torch.cuda.get_device_capability()
    assert head == f"cuda of compute capability {major}.{minor}, bfloat16, accumulates in float32"
    assert [row.split()[0] for row in rows] == list(kernel_names())
    assert explained.chosen in kernel_names()
    assert explain(x.double(), x.double(), x.double(), LONGNET).chosen == "eager"
    assert explain(x.float(), x.float(), x.float(), LONGNET).chosen == "sdpa"


def test_autocast():
    q, k, v, grad = (x.detach().cuda() for x in drawn.tensors((1, 200, 4, 2, 64), dtype=torch.float32))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with torch.autocast("cuda", torch.bfloat16):
        out = attend(*leaves, LONGNET)
    assert out.dtype == torch.bfloat16
    truth = attend(*(x.bfloat16() for x in leaves), LONGNET)
    assert torch.equal(out, truth)
    assert {x.dtype for x in torch.autograd.grad(out, leaves, grad.bfloat16())} == {torch.float32}


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_block_gives_equal_results(backend):
    if backend == "inductor" and (shutil.which("cc") or shutil.which("gcc")) is None:
        pytest.skip("the compiler needs a C compiler")

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = torch.nn.Linear(256, 768)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).unbind(2)
            return x + attend(q, k, v, LONGNET).flatten(2)

    block = Block().to("cuda", torch.bfloat16)
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    x = torch.randn(2, 300, 256, dtype=torch.bfloat16, device="cuda")
    a, b = block(x), compiled(x)
    close(b, a.cpu(), 0.02)
    for one, other in zip(
        torch.autograd.grad(a.float().square().sum(), block.parameters()),
        torch.autograd.grad(b.float().square().sum(), block.parameters()),
        strict=True,
    ):
        close(other, one.cpu(), 0.02)
