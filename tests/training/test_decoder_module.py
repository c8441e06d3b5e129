"""CausalLMModule in one process: the losses of many architectures, recomputation, and text."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.plugins.environments import LightningEnvironment
from tiers import tiered
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_longnet import CausalLMModule, chunked_cross_entropy, decay_groups

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SMALL = {
    **{"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
KINDS = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
    "gemma2": {"query_pre_attn_scalar": 8, "final_logit_softcapping": 0.5},
    "phi3": {},
    "olmo2": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "glm": {},
    # whose model without its head is not the `base_model`
    "llama4_text": {"num_local_experts": 4, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 48},
}
IDS = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(2))
LABELS = IDS.roll(-1, 1).masked_fill(torch.arange(24) % 7 == 6, -100)


def module(kind="qwen3", **options):
    torch.manual_seed(3)
    config = {"model_type": kind, **SMALL, **KINDS[kind]}
    if kind in ("cohere", "granite", "phi3", "mixtral", "olmo2"):
        config.pop("head_dim")
    made = CausalLMModule(config=config, dtype="float64", **options)
    made.model.set_experts_implementation("eager")  # others have no float64
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            if "embed" in name or "lm_head" in name:
                parameter.mul_(20)  # logits that a bound changes
    return made


def gradients(net, loss):
    return torch.autograd.grad(loss, [p for p in net.parameters() if p.requires_grad], allow_unused=True)


@pytest.mark.parametrize("kind", tiered(KINDS, quick=["cohere", "gemma2", "llama4_text"]))
def test_the_loss_in_chunks_is_that_of_the_models_own_logits(kind):
    net = module(kind, loss_chunk=5, attention="eager")
    loss, count = net.token_loss(IDS, LABELS)
    logits = net.model(input_ids=IDS, use_cache=False).logits
    expected = F.cross_entropy(logits.flatten(0, 1).double(), LABELS.flatten(), reduction="sum")
    assert count == (LABELS != -100).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(net(IDS), logits, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(gradients(net, loss), gradients(net, expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_logits_are_scaled_and_bounded(softcap):
    torch.manual_seed(0)
    hidden = torch.randn(13, 8, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((11, 8), (11,)))
    labels = torch.randint(11, (13,)).index_fill(0, torch.tensor([4]), -100)
    loss, _ = chunked_cross_entropy(hidden, weight, labels, bias, chunk_tokens=3, logit_scale=0.7, softcap=softcap)
    logits = 0.7 * F.linear(hidden, weight, bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = F.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(loss, expected)
    leaves = [hidden, weight, bias]
    torch.testing.assert_close(torch.autograd.grad(2 * loss, leaves), torch.autograd.grad(2 * expected, leaves))
    with pytest.raises(ValueError, match="softcap must be positive or None, got -1"):
        chunked_cross_entropy(hidden, weight, labels, softcap=-1.0)


class Calls(TorchDispatchMode):
    """Counts the calls of the operator of attention."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.lightning_longnet.attend.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("recompute", "calls"), [("nothing", 2), ("all but attention", 2), ("everything", 4)])
def test_recomputation_leaves_attention_alone_and_changes_nothing(recompute, calls):
    plain = module(lora={"r": 2, "init_lora_weights": False})
    net = module(recompute=recompute, lora={"r": 2, "init_lora_weights": False})
    net.load_state_dict(plain.state_dict())
    with Calls() as result:
        net.token_loss(IDS, LABELS)[0].backward()
    assert result.count == calls
    plain.token_loss(IDS, LABELS)[0].backward()
    for (name, ours), theirs in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert ("lora_" in name) == (ours.grad is not None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda m, n=name: f"{n}: {m}")


def test_text_is_that_of_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    net = module()
    net.save_pretrained(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    expected = plain.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, min_new_tokens=6, do_sample=False
    )
    assert net.generate(IDS, 6, temperature=0).tolist() == expected.tolist()
    assert net.generate(IDS, 6, seed=1).tolist() == net.generate(IDS, 6, seed=1).tolist()
    assert net.model.training
    with pytest.raises(ValueError, match="folder must be new or empty"):
        net.save_pretrained(tmp_path / "out")


def test_norms_of_transformers_do_not_decay_and_experts_do():
    net = module("mixtral")
    names = {parameter: name for name, parameter in net.named_parameters()}
    decaying, others = ({names[each] for each in group["params"]} for group in decay_groups(net, 0.1))
    assert all("norm" in name for name in others)
    assert any("experts" in name for name in decaying)
    assert not any("norm" in name for name in decaying)


def test_a_head_that_does_more_is_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    class Twice(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits**2
            return out

    with pytest.raises(ValueError, match="output head of Twice must be a linear map of the last hidden states"):
        CausalLMModule(Twice(LlamaConfig(**{**SMALL, "head_dim": None})))


def test_a_loss_of_the_router_is_refused():
    config = {"model_type": "mixtral", **SMALL, **KINDS["mixtral"], "output_router_logits": True}
    config.pop("head_dim")
    with pytest.raises(ValueError, match="output_router_logits must be False in the configuration of the Mixtral"):
        CausalLMModule(config=config)


def test_adapters_for_other_weights_are_refused(tmp_path):
    for seed in (1, 2):
        torch.manual_seed(seed)
        CausalLMModule(config={"model_type": "qwen3", **SMALL}).save_pretrained(tmp_path / str(seed))
    one, two = (CausalLMModule(name=str(tmp_path / str(seed)), lora={"r": 2}) for seed in (1, 2))
    checkpoint = {"hyper_parameters": dict(one.hparams)}
    one.on_save_checkpoint(checkpoint)
    one.on_load_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="adapters were trained with other weights than those of this model"):
        two.on_load_checkpoint(checkpoint)
    with pytest.raises(ValueError, match=r"the checkpoint's model has lora \{'r': 2\}, and this one None"):
        module().on_load_checkpoint(checkpoint)
    other = {"hyper_parameters": {"config": {**SMALL, "model_type": "qwen3", "rope_theta": 5.0, "head_dim": 16}}}
    with pytest.raises(ValueError, match="the checkpoint's model has head_dim 16, and this one has 8"):
        module().on_load_checkpoint(other)
    with pytest.raises(ValueError, match="the checkpoint must hold the adapters of lora"):
        one.load_state_dict({"model.model.norm.weight": torch.zeros(32)})


def test_a_checkpoint_makes_the_module_again_without_a_trainer(tmp_path):
    made = module()
    options = {"logger": False, "enable_checkpointing": False, "plugins": [LightningEnvironment()]}
    trainer = L.Trainer(accelerator="cpu", **options)
    trainer.strategy.connect(made)
    trainer.save_checkpoint(tmp_path / "some.ckpt", weights_only=True)
    again = CausalLMModule.load_from_checkpoint(tmp_path / "some.ckpt")
    assert list(again.state_dict()) == list(made.state_dict())
    assert all(map(torch.equal, again.state_dict().values(), made.state_dict().values()))
