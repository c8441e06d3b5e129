"""Weights of which each rank reads its parts: the same run as with ordinary loading, from less memory."""

import re

import pytest
import torch
from decoder_runs import fit, module, rows
from memory import peak_bytes
from tiers import tiered
from torch.utils.data import DataLoader
from trained import collated, quiet, trainer_of

from lightning_longnet import CausalLMModule
from lightning_longnet.huggingface.weight_files import part_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
LARGE = {
    **{"model_type": "gemma3_text", "vocab_size": 3001, "hidden_size": 128, "intermediate_size": 512},
    **{"num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("weights") / "model"
    module("float32").save_pretrained(made)
    return str(made)


def trained(trainers, folder, sharding, world, load_sharded):
    options = {"config": None, "name": folder, "load_sharded": load_sharded}
    return trainers.run(world, fit, "float32", sharding, 2, options)


@pytest.mark.parametrize(
    ("sharding", "world"),
    tiered(
        [("fsdp2", 2), ("ddp", 2), ("fsdp2_offload", 2), ("hsdp", 4), ("fsdp2", 4)],
        quick=[],
        long=[("hsdp", 4)],
    ),
)
def test_a_run_is_that_of_ordinary_loading(trainers, folder, sharding, world):
    result = trained(trainers, folder, sharding, world, True)
    expected = trained(trainers, folder, sharding, world, False)
    for (losses, parameters), (right, best) in zip(result, expected, strict=True):
        assert losses == right
        assert parameters.keys() == best.keys()
        for name, x in parameters.items():
            assert torch.equal(x, best[name]), name


@pytest.mark.long
def test_a_run_goes_on_from_a_checkpoint(trainers, folder, tmp_path):
    options = {"config": None, "name": folder, "load_sharded": True}
    whole = trainers.run(2, fit, "float32", "fsdp2", 2, options, str(tmp_path / "run"))
    saved = str(tmp_path / "run" / "saved" / "step=2.ckpt")
    resumed = trainers.run(2, fit, "float32", "fsdp2", 2, options, str(tmp_path / "resumed"), saved)
    for (losses, parameters), (expected_losses, expected) in zip(resumed, whole, strict=True):
        assert losses == expected_losses[2:]
        for name, x in expected.items():
            assert torch.equal(parameters[name], x), name


class ShardedByItself(CausalLMModule):
    """A module whose blocks are sharded by itself, before the strategy reads the weights."""

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        super().configure_model()
        for block in self.model.model.layers:
            fully_shard(block)


def weights_of(rank, world, folder, load_sharded):
    """Return the loss of a validation, and all parameters."""
    from lightning_longnet.strategies import RingSequenceParallelStrategy

    with quiet():
        net = ShardedByItself(name=folder, load_sharded=load_sharded)
        trainer = trainer_of(RingSequenceParallelStrategy(world, sharding="fsdp2"), world)
        results = trainer.validate(net, DataLoader(rows(4), 2, collate_fn=collated), verbose=False)
        return results, {
            name: getattr(x, "full_tensor", lambda x=x: x)().detach() for name, x in net.named_parameters()
        }


@pytest.mark.long
def test_a_module_that_shards_itself_gets_its_weights(trainers, folder):
    results, expected_results = (trainers.run(2, weights_of, folder, each) for each in (True, False))
    for (losses, parameters), (expected_losses, expected) in zip(results, expected_results, strict=True):
        assert losses == expected_losses
        assert parameters.keys() == expected.keys()
        for name, x in parameters.items():
            assert torch.equal(x, expected[name]), name


def averaged(rank, world, folder, sharding, load_sharded):
    """Return the parameters, and their average, of a run with a callback that averages weights."""
    from lightning.pytorch.callbacks import EMAWeightAveraging

    from lightning_longnet.strategies import RingSequenceParallelStrategy

    with quiet():
        net = CausalLMModule(name=folder, load_sharded=load_sharded, learning_rate=0.1, warmup_steps=0)
        averaging = EMAWeightAveraging(decay=0.5)
        trainer = trainer_of(RingSequenceParallelStrategy(world, sharding), world, callbacks=[averaging], max_steps=2)
        trainer.fit(net, DataLoader(rows(4), 2, collate_fn=collated))
        return [x.detach() for model in (net, averaging._average_model.module) for x in model.parameters()]


def test_averages_of_weights_that_are_not_read_yet_are_refused(trainers, folder):
    for is_result, outcome in trainers.outcomes(2, averaged, folder, "fsdp2", True):
        assert not is_result
        assert re.search(
            r"EMAWeightAveraging must have weights to copy at set-up, got parameters on the meta device.*: set "
            r"load_sharded=False",
            outcome[1],
        )


@pytest.mark.long
def test_averages_of_weights_that_are_not_sharded_are_right(trainers, folder):
    sharded, whole = (trainers.run(2, averaged, folder, "ddp", each) for each in (True, False))
    for result, expected in zip(sharded, whole, strict=True):
        assert len(result) == len(expected) > 40
        assert all(map(torch.equal, result, expected))


def load(rank, world, folder, load_sharded):
    """Return the peak of the memory of a rank from the module to the first step, and all parameters and buffers."""
    from lightning_longnet.strategies import RingSequenceParallelStrategy

    kept = {}

    def call():
        net = CausalLMModule(name=folder, load_sharded=load_sharded)
        trainer_of(RingSequenceParallelStrategy(sharding="fsdp2"), world).validate(net, [], verbose=False)
        kept["net"] = net

    with quiet():
        peak = peak_bytes(call)
        named = [*kept["net"].model.named_parameters(), *kept["net"].model.named_buffers()]
        held = {name: getattr(x, "full_tensor", lambda x=x: x)().detach().clone() for name, x in named}
    return peak, held


def test_a_rank_holds_its_parts_and_never_the_whole(trainers, tmp_path):
    torch.manual_seed(0)
    made = CausalLMModule(config=LARGE)
    made.save_pretrained(tmp_path / "model")
    whole = sum(4 * p.numel() for p in made.model.parameters())
    largest = max(4 * p.numel() for p in made.model.parameters())
    plain = trainers.run(2, load, str(tmp_path / "model"), False)
    for (peak, held), (ordinary, expected) in zip(
        trainers.run(2, load, str(tmp_path / "model"), True), plain, strict=True
    ):
        assert peak < (whole + largest) / 2 + 2**18
        assert ordinary > 1.4 * whole  # the whole beside the parts
        assert held.keys() == expected.keys()
        for name, x in held.items():
            assert torch.equal(x, expected[name]), name


def test_what_cannot_be_read_in_parts_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    made = module("float32")
    made.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)

    def refused(changed, message):
        save_file(changed, path, {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            CausalLMModule(name=str(tmp_path / "model"), load_sharded=True)

    norm = "model.norm.weight"
    refused({**tensors, norm: torch.zeros(3)}, r"model\.norm\.weight of .* must have the shape \(32,\)")
    refused({**tensors, "other.weight": torch.zeros(3)}, r"the file has other\.weight, which the model has not")
    refused({name: x for name, x in tensors.items() if name != norm}, r"the file has no model\.norm\.weight")
    path.unlink()
    with pytest.raises(ValueError, match=r"which has no model\.safetensors"):
        CausalLMModule(name=str(tmp_path / "model"), load_sharded=True)
    with pytest.raises(ValueError, match="load_sharded is for the weights of a name, without lora"):
        CausalLMModule(name=str(tmp_path / "model"), load_sharded=True, lora={"r": 2})


def test_the_head_is_checked_before_there_are_weights(tmp_path, monkeypatch):
    from transformers import Qwen3ForCausalLM

    module("float32").save_pretrained(tmp_path / "model")
    forward = Qwen3ForCausalLM.forward

    def doubled(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = 2 * out.logits
        return out

    monkeypatch.setattr(Qwen3ForCausalLM, "forward", doubled)
    with pytest.raises(ValueError, match="output head of Qwen3ForCausalLM must be a linear map"):
        CausalLMModule(name=str(tmp_path / "model"), load_sharded=True)


@pytest.mark.parametrize("kind", ["gemma3_text", "qwen3"])
def test_files_in_parts_and_in_half_types_are_read(tmp_path, kind):
    from transformers import AutoModelForCausalLM

    made = CausalLMModule(config={**LARGE, "model_type": kind, "num_hidden_layers": 1}, dtype="bfloat16")
    made.model.save_pretrained(tmp_path / "model", max_shard_size="200KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    net = CausalLMModule(name=str(tmp_path / "model"), load_sharded=True)
    assert all(p.is_meta for p in net.model.parameters())
    net._load_sharded_weights(torch.device("cpu"))
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for kept in ("named_parameters", "named_buffers"):
        held = dict(getattr(net.model, kept)())
        assert held.keys() == dict(getattr(expected, kept)()).keys()
        for name, x in getattr(expected, kept)():
            assert torch.equal(x, held[name]), name


@pytest.mark.parametrize(("rows", "ranks"), [(10, 4), (3, 4), (8, 2), (9, 4)])
def test_parts_are_those_of_fsdp2(rows, ranks):
    parts = torch.arange(rows).chunk(ranks)
    for rank in range(ranks):
        expected = parts[rank].tolist() if rank < len(parts) else []
        assert list(range(rows))[part_of(rows, ranks, rank)] == expected
