"""A model of transformers, trained over any mesh and engine, equals a plain loop of transformers in one process."""

from functools import cache
from itertools import product

import pytest
import torch
from decoder_runs import CONFIG, LORA, fit, module, plain_loop, predict, predict_documents, rows, validate
from tiers import tiered
from trained import collated

from lightning_longnet import CausalLMModule, read_checkpoint

MESHES = {"1x2": (2, 2), "2x2": (4, 2)}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@cache
def expected(dtype, lora=False, name=None):
    return plain_loop(dtype, *(({"config": None, "name": name}, LORA) if lora else ()))


def compare(result, reference, tolerance):
    (losses, parameters), (right, best) = result, reference
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(right), rtol=tolerance, atol=tolerance)
    assert {name: x for name, x in parameters.items() if name not in best} == {}
    for name, x in parameters.items():
        torch.testing.assert_close(x, best[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_the_plain_loop_learns():
    losses, _ = expected("float64")
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(
    ("sharding", "mesh"), tiered(product(["ddp", "fsdp2"], MESHES), quick=[("ddp", "1x2")], long=[("fsdp2", "2x2")])
)
def test_float64_equals_a_plain_loop(trainers, sharding, mesh):
    world, size = MESHES[mesh]
    for result in trainers.run(world, fit, "float64", sharding, size):
        compare(result, expected("float64"), 1e-6)


@pytest.mark.parametrize("mesh", tiered(MESHES, quick=[], long=[]))
def test_float32_of_deepspeed_equals_a_plain_loop(deepspeed_trainers, mesh):
    world, size = MESHES[mesh]
    for result in deepspeed_trainers(world).run(world, fit, "float32", "deepspeed_stage_3", size):
        compare(result, expected("float32"), 1e-4)


@pytest.mark.parametrize(
    ("sharding", "recompute"),
    tiered(
        product(["fsdp2", "deepspeed_stage_3"], ["everything", "all but attention"]),
        quick=[],
        long=[("fsdp2", "everything")],
    ),
)
def test_savings_of_memory_train_the_same(request, sharding, recompute):
    trainers, dtype, tolerance = runs_of(sharding, request)
    savings = {"recompute": recompute, "activation_offload": True, "mlp_chunk_tokens": 4}
    for result in trainers(2).run(2, fit, dtype, sharding, 2, savings):
        compare(result, expected(dtype), tolerance)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with the weights of a model, as it would be downloaded."""
    folder = tmp_path_factory.mktemp("base") / "model"
    module("float32").save_pretrained(folder)
    return str(folder)


def runs_of(sharding, request):
    if sharding.startswith("deepspeed"):
        made = request.getfixturevalue("deepspeed_trainers")
        return made, "float32", 1e-4
    trainers = request.getfixturevalue("trainers")
    return (lambda _: trainers), "float64", 1e-6


@pytest.mark.parametrize(
    ("sharding", "adapted"),
    tiered(
        product(["ddp", "fsdp2", "deepspeed_stage_3"], [False, True]),
        quick=[],
        long=[("fsdp2", True)],
    ),
)
def test_a_run_goes_on_from_another_mesh_and_is_exported(request, tmp_path, base, sharding, adapted):
    from transformers import AutoModelForCausalLM

    trainers, dtype, tolerance = runs_of(sharding, request)
    options = {"config": None, "name": base, "lora": LORA, "seed": 7} if adapted else {}
    reference = expected(dtype, adapted, base if adapted else None)
    for result in trainers(2).run(2, fit, dtype, sharding, 2, options, str(tmp_path)):
        compare(result, reference, tolerance)
    saved = tmp_path / "saved" / "step=2.ckpt"
    names = set(read_checkpoint(saved).state_dict)
    assert all("lora_" in name for name in names) == adapted
    assert names
    for losses, parameters in trainers(4).run(4, fit, dtype, sharding, 2, options, None, str(saved)):
        compare((losses, parameters), (reference[0][2:], reference[1]), tolerance)

    torch.manual_seed(7)
    plain = CausalLMModule(**{"config": CONFIG, "dtype": dtype, **options_of_module(options)}, attention="sdpa").model
    plain.load_state_dict(reference[1], strict=False)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=dtype)
    assert not [name for name, _ in exported.named_parameters() if "lora" in name]
    ids = collated(rows())["input_ids"]
    torch.testing.assert_close(exported(ids).logits, plain.eval()(ids).logits, rtol=tolerance, atol=10 * tolerance)


def options_of_module(options):
    return {name: value for name, value in options.items() if name != "seed"}


@pytest.mark.parametrize(
    ("sharding", "is_padded"),
    tiered([("ddp", False), ("fsdp2", False), ("fsdp2", True)], quick=[], long=[("fsdp2", True)]),
)
def test_predicted_texts_are_those_of_one_process(trainers, sharding, is_padded):
    (alone,) = trainers.run(1, predict, "ddp", 1, is_padded)
    assert alone.shape == (4, 41)
    for result in trainers.run(2, predict, sharding, 2, is_padded):
        assert result.tolist() == alone.tolist()


@pytest.mark.parametrize("reads_parts", tiered([False, True], quick=[], long=[True]))
def test_rows_of_several_documents_are_refused_on_all_ranks(trainers, reads_parts):
    """Also where each rank sees one document of them."""
    for message in trainers.run(2, predict_documents, reads_parts):
        assert message.startswith(
            "documents must be the same in all tokens of a row that is to be continued, got 0 and 1"
        )


@pytest.mark.parametrize(("world", "size"), tiered([(2, 2), (4, 2)], quick=[], full=[(2, 2)]))
def test_padding_at_the_end_changes_nothing(trainers, world, size):
    (alone,) = trainers.run(1, validate, 1)
    assert trainers.run(world, validate, size) == pytest.approx([alone] * world, rel=1e-7)
