"""CausalLMModule with layer inputs on the host and feed-forwards in chunks: the same gradients from less memory."""

import pytest
import torch
from memory import peak_bytes
from test_decoder_module import IDS, LABELS, module
from tiers import tiered

from lightning_longnet import CausalLMModule
from lightning_longnet.layers import offloading

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SAVINGS = {
    "chunks": {"mlp_chunk_tokens": 5},
    "chunks of one token": {"mlp_chunk_tokens": 1, "recompute": "everything"},
    "inputs on the host": {"recompute": "everything", "activation_offload": True},
    "attention on the host": {"recompute": "all but attention", "activation_offload": True},
    "all": {"recompute": "all but attention", "activation_offload": True, "mlp_chunk_tokens": 7},
}
KINDS = ["llama", "qwen3", "gemma2", "phi3", "cohere", "granite", "glm", "olmo2"]
LARGE = {
    **{"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 256, "num_hidden_layers": 4},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2},
}
TOKENS, CHUNK = 1024, 64
HIDDEN = TOKENS * LARGE["hidden_size"] * 4  # bytes of the hidden states of all tokens
WIDE = TOKENS * LARGE["intermediate_size"] * 4


def step(net):
    net.zero_grad()
    loss, _ = net.token_loss(IDS, LABELS)
    loss.backward()
    return loss.detach(), [None if p.grad is None else p.grad.clone() for p in net.parameters()]


@pytest.mark.parametrize("savings", SAVINGS)
@pytest.mark.parametrize("kind", tiered(KINDS, quick=["gemma2"]))
def test_savings_of_memory_change_nothing(kind, savings):
    options = SAVINGS[savings]
    plain, net = module(kind), module(kind, **options)
    net.load_state_dict(plain.state_dict())
    (loss, gradients), (wanted_loss, expected) = step(net), step(plain)
    # sums over chunks are rounded in another order; copies are exact.  Gemma's norms compute in float32
    rtol, atol = (1e-6, 1e-7) if kind in ("gemma2", "cohere") else (1e-11, 1e-12)
    if "mlp_chunk_tokens" not in options:
        rtol = atol = 0
    torch.testing.assert_close(loss, wanted_loss, rtol=rtol, atol=atol)
    torch.testing.assert_close(gradients, expected, rtol=rtol, atol=atol)


@pytest.fixture
def host(monkeypatch):
    """Let the memory of numpy stand for that of the host, and torch's for that of the device; list what is stored."""
    shapes = []

    def store(x):
        shapes.append(tuple(x.shape))
        return offloading.Stored(x.detach().numpy().copy(), x.device)

    monkeypatch.setattr(offloading, "store", store)
    monkeypatch.setattr(offloading, "load", lambda stored: torch.from_numpy(stored.copy))
    return shapes


@pytest.mark.parametrize("recompute", ["everything", "all but attention"])
def test_the_host_holds_the_input_of_each_layer_and_nothing_else(host, recompute):
    net = module("llama", recompute=recompute, activation_offload=True)
    losses = net.token_loss(IDS, LABELS)[0]
    attention = [(2, 24, 4, 8), (2, 4, 24)] if recompute == "all but attention" else []
    assert [shape for shape in host if len(shape) > 1] == 2 * [(2, 24, 32), *attention]
    losses.backward()
    assert len([shape for shape in host if len(shape) > 1]) == 2 * (1 + len(attention))


def peak(**options):
    torch.manual_seed(0)
    net = CausalLMModule(config=LARGE, loss_chunk=256, **options)
    ids = torch.randint(64, (1, TOKENS))

    def call():
        net.zero_grad(set_to_none=False)  # gradients are there before
        net.token_loss(ids, ids)[0].backward()

    call()
    return peak_bytes(call)


@pytest.mark.long
def test_the_device_holds_one_layer_and_one_chunk(host):
    recomputed, chunked = peak(recompute="everything"), peak(recompute="everything", mlp_chunk_tokens=CHUNK)
    assert chunked < recomputed - 4 * WIDE
    layers = LARGE["num_hidden_layers"]
    inputs = recomputed - peak(recompute="everything", activation_offload=True)
    assert inputs == pytest.approx(layers * HIDDEN, rel=0.01)
    kept = peak(recompute="all but attention", mlp_chunk_tokens=CHUNK)
    moved = kept - peak(recompute="all but attention", mlp_chunk_tokens=CHUNK, activation_offload=True)
    lse = TOKENS * LARGE["num_attention_heads"] * 4
    assert moved == pytest.approx(layers * (2 * HIDDEN + lse), rel=0.02)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("mixtral", {"mlp_chunk_tokens": 4}, r"model\.layers\.0\.mlp \(MixtralSparseMoeBlock\) is no feed-forward"),
        ("llama", {"mlp_chunk_tokens": 0}, "mlp_chunk_tokens must be a positive integer, got 0"),
        (
            "llama",
            {"activation_offload": True},
            "recompute must be 'everything' or 'all but attention' with activation_",
        ),
        (
            "llama",
            {"activation_offload": 1, "recompute": "everything"},
            "activation_offload must be True or False, got 1",
        ),
    ],
)
def test_savings_that_cannot_be_had_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        module(kind, **options)


def test_a_feed_forward_that_mixes_tokens_is_refused():
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaMLP

    class Shifting(LlamaMLP):
        def forward(self, x):
            return super().forward(x + x.roll(1, -2))

    net = LlamaForCausalLM(LlamaConfig(**{name: value for name, value in LARGE.items() if name != "model_type"}))
    net.model.layers[3].mlp = Shifting(net.config)
    with pytest.raises(ValueError, match=r"model\.layers\.3\.mlp \(Shifting\) computes a token from others"):
        CausalLMModule(net, mlp_chunk_tokens=4)
    net.model.layers[3].mlp.gate_proj.gate = torch.nn.Conv1d(3, 3, 1)
    with pytest.raises(
        ValueError, match=r"\(Shifting\) has gate_proj\.gate \(Conv1d\), which may compute a token from"
    ):
        CausalLMModule(net, mlp_chunk_tokens=4)


def test_results_of_attention_on_the_host_serve_one_backward():
    net = module("llama", recompute="all but attention", activation_offload=True)
    loss = net.token_loss(IDS, LABELS)[0]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="on the host serve one backward"):
        loss.backward()
