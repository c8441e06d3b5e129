"""What holds of each layer: copies, files, devices, types, dropout, and how its weights begin."""

import copy
import pickle
from math import log, sqrt

import pytest
import torch

from lightning_longnet import DilatedSelfAttention, FeedForward, MultiheadDilatedAttention, Pattern, magneto_gain

CAUSAL = Pattern.dilated((4, 16), (1, 2), is_causal=True)


def made(kind, **settings):
    if kind == "feed forward":
        return FeedForward(16, 24, sub_norm=True, **settings)
    if kind == "multihead":
        return MultiheadDilatedAttention(16, 4, batch_first=True, pattern=CAUSAL, sub_norm=True, **settings)
    return DilatedSelfAttention(
        16, 4, CAUSAL, num_kv_heads=2, qk_norm=True, sub_norm=True, bias=True, rotary="xpos", **settings
    )


def called(layer, x):
    return layer(x, x, x)[0] if isinstance(layer, MultiheadDilatedAttention) else layer(x)


KINDS = pytest.mark.parametrize("kind", ["self attention", "multihead", "feed forward"])


@KINDS
def test_copies_and_files_compute_the_same(kind, tmp_path):
    layer, x = made(kind), torch.randn(2, 20, 16)
    torch.save(layer, tmp_path / "layer.pt")
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    fresh = made(kind)
    assert not torch.equal(called(fresh, x), called(layer, x))
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    loaded = torch.load(tmp_path / "layer.pt", weights_only=False)
    for other in (fresh, loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(called(other, x), called(layer, x))


@KINDS
def test_a_layer_from_the_meta_device_is_initialised_by_reset_parameters(kind):
    layer = made(kind, device="meta", gain=1.7)
    assert all(p.is_meta for p in layer.parameters())
    layer.to_empty(device="cpu")
    assert any(p.isnan().any() for p in layer.parameters())
    torch.manual_seed(3)
    layer.reset_parameters()
    truth = made(kind, gain=1.7)
    torch.manual_seed(3)
    truth.reset_parameters()
    for name, parameter in truth.named_parameters():
        assert torch.equal(layer.get_parameter(name), parameter), name
    assert called(layer, torch.randn(1, 5, 16)).isfinite().all()


@KINDS
def test_every_parameter_has_a_gradient(kind):
    layer = made(kind)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)  # at their beginning, biases and norms may have none
    called(layer, torch.randn(2, 20, 16)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        # a bias of k alone adds the same to all scores of a query; parts of a fused bias are looked at together
        assert parameter.grad.abs().max() > 1e-6, name


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_to_bfloat16(kind, dtype):
    layer, x = made(kind), torch.randn(2, 20, 16, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        out = called(layer, x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), called(layer, x.float()), rtol=0.05, atol=0.05)
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


@KINDS
def test_a_layer_of_bfloat16(kind):
    layer, x = made(kind, dtype=torch.bfloat16), torch.randn(2, 20, 16)
    out = called(layer, x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), called(layer.float(), x), rtol=0.05, atol=0.05)


@KINDS
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiles_in_one_graph(kind):
    layer, x = made(kind), torch.randn(2, 20, 16)
    compiled = torch.compile(lambda x: called(layer, x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), called(layer, x))


@KINDS
def test_dropout_is_of_training_alone(kind):
    layer, x = made(kind, dropout=0.5), torch.randn(2, 20, 16)
    torch.manual_seed(1)
    first = called(layer, x)
    torch.manual_seed(1)
    assert torch.equal(called(layer, x), first)
    assert not torch.equal(called(layer, x), first)
    assert torch.equal(called(layer.eval(), x), called(layer, x))
    assert not torch.equal(called(layer, x), first)


class TestInitialisation:
    """Measured against gain * sqrt(2 / (fan_in + fan_out)), each part of a fused weight with its own fans."""

    @staticmethod
    def assert_xavier(weight, gain):
        rows, columns = weight.shape
        assert weight.mean().abs() < 4 * gain * sqrt(2 / (rows + columns) / weight.numel())
        assert weight.std().item() == pytest.approx(gain * sqrt(2 / (rows + columns)), rel=0.03)

    @pytest.mark.parametrize("gain", [1.0, magneto_gain(24)])
    def test_self_attention(self, gain):
        layer = DilatedSelfAttention(192, 6, CAUSAL, num_kv_heads=3, head_dim=64, bias=True, gain=gain)
        for part, expected in zip(layer.qkv_proj.weight.split([384, 192, 192]), (1, 1, gain), strict=True):
            self.assert_xavier(part, expected)
        self.assert_xavier(layer.out_proj.weight, gain)
        assert not layer.qkv_proj.bias.any()
        assert not layer.out_proj.bias.any()

    @pytest.mark.parametrize("widths", [{}, {"kdim": 128, "vdim": 320}])
    @pytest.mark.parametrize(("gain", "sub_norm"), [(1.0, True), (1.7, False), (1.7, True)])
    def test_multihead(self, widths, gain, sub_norm):
        layer = MultiheadDilatedAttention(192, 6, gain=gain, sub_norm=sub_norm, **widths)
        parts = [layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight]
        for part, expected in zip(parts if widths else layer.in_proj_weight.chunk(3), (1, 1, gain), strict=True):
            self.assert_xavier(part, expected)
        self.assert_xavier(layer.out_proj.weight, gain)
        assert not layer.in_proj_bias.any()
        assert not layer.out_proj.bias.any()

    def test_feed_forward(self):
        layer = FeedForward(128, gain=1.7)
        for linear in (layer.first, layer.second):
            self.assert_xavier(linear.weight, 1.7)
            assert not linear.bias.any()

    def test_the_gain_is_that_of_the_paper(self):
        assert magneto_gain(24) == sqrt(log(48))

    def test_of_no_layers_there_is_no_gain(self):
        with pytest.raises(ValueError, match="layers must be a positive integer, got 0"):
            magneto_gain(0)
