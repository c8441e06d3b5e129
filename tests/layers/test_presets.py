"""Every preset against the brute force of its pattern, on 1, 2 and 4 ranks; and wherever its name is taken."""

import sys
from itertools import product
from pathlib import Path

import brute
import lightning as L
import pytest
import torch
from brute import Shown
from contexts import made
from tiers import tiered
from torch.utils.data import DataLoader

from lightning_longnet import (
    DilatedSelfAttention,
    LongNet,
    LongNetConfig,
    LongNetModule,
    LongViT,
    LongViTConfig,
    Pattern,
    attach_context,
    available_presets,
    create_standardized_ring_attention,
    sequence_hilbert_order,
)
from lightning_longnet.cli import main
from lightning_longnet.layers.presets import preset_of

ROOT = Path(__file__).parents[2]
BATCH, LENGTH, HEADS, DIM = 2, 45, 4, 6
SEGMENTS, RATES = [8, 32], [1, 2]
SPARSE = {"block_size": 3, "sparsity_ratio": 0.4}
PATTERN = Pattern.dilated(SEGMENTS, RATES)


def drawn(count=4, length=LENGTH):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, BATCH, length, HEADS, DIM, dtype=torch.float64, generator=generator).unbind()


def arguments(name):
    return {"segment_lengths": SEGMENTS, "dilation_rates": RATES} | (SPARSE if name == "block_sparse" else {})


def tables(name, is_causal):
    """How often each branch counts a pair, from the definitions alone."""
    given = arguments(name)
    if name == "block_sparse":
        within = Pattern.dilated(SEGMENTS, RATES, is_causal=is_causal)
        return [Pattern.block_sparse("local_window", 3, 0.4, within=within).mask(LENGTH, HEADS).double()]
    pairs = zip(given["segment_lengths"], given["dilation_rates"], strict=True)
    shown = [Shown(w, r, None, is_causal and name != "hilbert") for w, r in pairs]
    result = brute.counts(shown, "multiset", LENGTH, HEADS)
    if name == "hilbert":
        place = sequence_hilbert_order(LENGTH).argsort()
        result = [table[:, place][:, :, place] for table in result]
        result = [table.tril() for table in result] if is_causal else result
    return result


def step(group, name, given, is_causal, placement):
    """One rank's out and gradients of its part, and its tokens."""
    layer = create_standardized_ring_attention(name, **given)
    context = made(group, placement)
    attach_context(layer, context)
    *parts, grad = (context.split({"x": x}, {"x": 1})["x"] for x in drawn())
    leaves = [part.clone().requires_grad_() for part in parts]
    out = layer(*leaves, is_causal=is_causal)
    return context.positions_of(out), out.detach(), *torch.autograd.grad(out, leaves, grad)


@pytest.mark.parametrize(
    ("name", "is_causal"),
    tiered(
        product(available_presets(), [False, True]),
        quick=[("production", True), ("ulysses", False), ("hilbert", True), ("block_sparse", False)],
        covers=1,
    ),
)
def test_equals_brute_force_on_1_2_and_4_ranks(pool, name, is_causal):
    *wide, grad = drawn()
    wide = [x.requires_grad_() for x in wide]
    out = brute.attention(*wide, [tables(name, is_causal)] * BATCH, DIM**-0.5)[0]
    truth = out, *torch.autograd.grad(out, wide, grad)
    for world, placement in ((1, "contiguous"), (2, "zigzag"), (4, "contiguous")):
        for positions, *result in pool.run(world, step, name, arguments(name), is_causal, placement):
            for ours, true in zip(result, truth, strict=True):
                assert (ours - true[:, positions]).abs().max() <= 1e-10 * max(1, true.abs().max())


def test_hilbert_is_another_pattern_than_its_raster():
    assert not torch.equal(tables("hilbert", False)[0], tables("ring", False)[0])


def test_each_has_a_line_of_its_own():
    lines = available_presets()
    assert list(lines) == ["collective", "ring", "ulysses", "hilbert", "block_sparse", "production"]
    assert len(set(lines.values())) == len(lines)
    assert all(line and "\n" not in line for line in lines.values())


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"preset must be one of .*'production', got 'hilbrt': is it 'hilbert'"):
        preset_of("hilbrt")
    with pytest.raises(ValueError, match="got 'prodction': is it 'production'"):
        LongNetConfig(PATTERN, preset="prodction")


CONFIG = {"pattern": PATTERN.to_dict(), "dim": 16, "layers": 2, "heads": 4, "vocab_size": 32}


@pytest.mark.parametrize("name", available_presets())
def test_models_take_it_and_their_plain_values_hold_it(name):
    module = LongNetModule({**CONFIG, "preset": name})
    config, row = module.config, preset_of(name)
    assert LongNetConfig(**config.to_dict()) == config
    assert [layer.attention.exchange for layer in module.model.blocks] == [row.exchange] * 2
    assert [layer.attention.ordering for layer in module.model.blocks] == [row.ordering] * 2
    assert [layer.attention.guard is not None for layer in module.model.blocks] == [row.is_guarded] * 2
    assert len({id(layer.attention.guard) for layer in module.model.blocks}) == 1  # one for all layers
    assert module.model.blocks[0].attention.guard is module.model.guard
    assert (config.pattern != PATTERN) == (name == "block_sparse")
    module.model(torch.arange(30)[None] % 32)


def test_what_contradicts_it_is_refused():
    with pytest.raises(ValueError, match="exchange must be 'ring' with preset='ring', got 'gather'"):
        LongNetConfig(PATTERN, preset="ring", exchange="gather")
    with pytest.raises(ValueError, match="ordering must be 'raster' with preset='ring', got 'hilbert'"):
        LongNetConfig(PATTERN, preset="ring", ordering="hilbert")
    with pytest.raises(ValueError, match="attention must be None with preset='ring'"):
        LongNetConfig(PATTERN, preset="ring", attention={"class_path": "torch.nn.Identity"})
    with pytest.raises(ValueError, match="ordering must be one of 'raster', 'hilbert', got 'snake'"):
        LongNetConfig(PATTERN, ordering="snake")


def test_images_are_ordered_where_they_enter_and_no_second_time():
    config = LongViTConfig(PATTERN, dim=16, heads=4, layers=1, image_size=32, patch_size=4, classes=2, preset="hilbert")
    assert config.ordering == "hilbert"
    assert LongViT(config).blocks[0].attention.ordering == "raster"


def test_the_command_line_takes_it(capsys, monkeypatch):
    words = ["fit", "--config", str(ROOT / "configs/quickstart.yaml"), "--model.config.preset", "ring"]
    monkeypatch.setattr(sys, "argv", ["longnet", *words, "--print_config"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert "preset: ring" in capsys.readouterr().out


def model_step(group, hidden, is_causal):
    """Loss and gradients of a model along a Hilbert curve, with padding and dropout, as a rank has them."""
    torch.manual_seed(0)
    options = {"preset": "hilbert", "attention_dropout": 0.2, "rotary": "rope"}
    options["pattern"] = Pattern.dilated(SEGMENTS, RATES, is_causal=is_causal)
    model = LongNet(LongNetConfig(**{**CONFIG, **options})).double()
    context = made(group)
    attach_context(model, context)
    tokens = torch.randint(32, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": tokens, "labels": tokens.roll(-1, 1), "attention_mask": (~hidden).long()}
    given = context.split(batch)
    context.begin_step(3)
    loss_sum, _ = model(given["input_ids"], given["labels"], attention_mask=given["attention_mask"])
    loss_sum.backward()
    return loss_sum.item(), [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("is_causal", tiered([False, True], quick=[True]))
def test_a_model_along_the_curve_is_the_same_on_more_ranks(pool, is_causal):
    hidden = torch.arange(LENGTH) >= torch.tensor([[LENGTH], [30]])
    ((loss, grads),) = pool.run(1, model_step, hidden, is_causal)
    for world in (2, 4):
        result = pool.run(world, model_step, hidden, is_causal)
        assert sum(own for own, _ in result) == pytest.approx(loss, rel=1e-10)
        for many, one in zip(zip(*(grads for _, grads in result), strict=True), grads, strict=True):
            torch.testing.assert_close(sum(many), one, rtol=1e-8, atol=1e-10)


class Reader(L.Callback):
    """Reads what the guard has counted, as anyone's callback may."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.result = dict(pl_module.model.guard.counts)


@pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
    "ignore:.*LeafSpec.*:FutureWarning",
)
def test_a_callback_reads_what_the_guard_counted():
    module = LongNetModule({**CONFIG, "preset": "production"})
    row = torch.arange(32)
    batches = [{"input_ids": row[None], "labels": row.roll(1)[None]}] * 3
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    reader = Reader()
    trainer = L.Trainer(accelerator="cpu", devices=1, max_steps=3, callbacks=[reader], **quiet)
    trainer.fit(module, DataLoader(batches, batch_size=None))
    assert reader.result == {"preflights": 1, "replacements": 0, "refusals": 0, "failures": 0}


def test_a_mask_of_another_shape_is_refused():
    layer = DilatedSelfAttention(16, 4, PATTERN, ordering="hilbert")
    with pytest.raises(ValueError, match=r"key_padding_mask must be \(batch, tokens\), \(1, 8\), got \(1, 7\)"):
        layer(torch.zeros(1, 8, 16), key_padding_mask=torch.zeros(1, 7, dtype=torch.bool))


def packed(group, ids):
    """The error of a layer along a curve, or the difference of its result from that of one process."""
    torch.manual_seed(0)
    layer = DilatedSelfAttention(16, 4, PATTERN, ordering="hilbert", rotary=None)
    context = made(group)
    attach_context(layer, context)
    whole = torch.randn(1, 8, 16)
    x = context.split({"x": whole}, {"x": 1})["x"]
    try:
        result = context.gather_sequence(layer(x, documents=ids[group.rank()]))
    except ValueError as error:
        return str(error)
    attach_context(layer, None)
    return float((result - layer(whole, documents=torch.cat(ids))).abs().max())


def test_documents_have_a_curve_of_their_own_on_all_ranks(pool):
    for result in pool.run(2, packed, [torch.tensor([0, 0, 0, 1]), torch.tensor([1, 1, 1, 2])]):
        assert result < 1e-6
    for result in pool.run(2, packed, [torch.zeros(4, dtype=torch.long), None]):
        assert result == "rows of documents must be equal on all ranks, got 1 on rank 0 and none on rank 1"
