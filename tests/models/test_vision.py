"""LongViT against a plain composition, its patches over ranks against one process, and its training."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from contexts import made
from tiers import tiered

from lightning_longnet import Pattern, SequenceContext, attach_context, hilbert_order, vision
from lightning_longnet.models.longvit import LongViT, LongViTConfig

PATTERN = Pattern.dilated((4, 8, 64), (1, 2, 2))
SMALL = {
    "pattern": PATTERN,
    "dim": 16,
    "layers": 2,
    "heads": 4,
    "classes": 5,
    "image_size": 20,
    "patch_size": 5,
    "channels": 2,
}
KINDS = {
    "mean": {},
    "tokens": {"normed": "tokens", "final_norm_eps": 1e-2},
    "class": {"pooling": "class", "rotary": "rope", "kv_heads": 2, "learned_positions": False},
    "both": {"pooling": "class", "rotary": "xpos", "activation": "swiglu"},
    "turned": {"rotary": "rope", "learned_positions": False},
}


def model_of(**changes):
    torch.manual_seed(0)
    model = LongViT(LongViTConfig(**{**SMALL, **changes})).double()
    with torch.no_grad():
        for parameter in model.parameters():  # nothing at 0 or 1, where it could be lost unseen
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def images(height=20, width=20):
    return torch.randn(3, 2, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def composed(model, pixels, ordering=None):
    """What the docstrings say, by torch's own convolution, in as few words as there are."""
    config = model.config
    weight = model.patch_embedding.weight.unflatten(1, (config.channels, config.patch_size, config.patch_size))
    grid = F.conv2d(pixels, weight, model.patch_embedding.bias, stride=config.patch_size)
    if config.learned_positions:
        table = model.position_table.permute(2, 0, 1)[None]
        grid = grid + F.interpolate(table, grid.shape[2:], mode="bicubic")
    x = grid.flatten(2).transpose(1, 2)
    if ordering is not None:
        x = x[:, ordering]
    if config.pooling == "class":
        x = torch.cat([model.class_token.expand(len(x), 1, -1), x], 1)
    positions = None
    if ordering is not None and config.rotary is not None:
        positions = torch.cat([torch.zeros(1).long(), ordering + 1]) if config.pooling == "class" else ordering
    for block in model.blocks:
        x = x + block.attention(block.attention_norm(x), positions=positions)
        x = x + block.feed_forward(block.feed_forward_norm(x))
    if config.normed == "tokens":
        x = model.norm(x)
    x = x[:, 0] if config.pooling == "class" else x.mean(1)
    return model.head(model.norm(x) if config.normed == "pooled" else x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(20, 20), (25, 10), (20, 35)])
def test_it_is_the_composition(kind, size):
    model, pixels = model_of(**KINDS[kind]), images(*size)
    ordering = torch.randperm(size[0] * size[1] // 25, generator=torch.Generator().manual_seed(2))
    plain = model(pixels)
    torch.testing.assert_close(plain, composed(model, pixels))
    torch.testing.assert_close(model(pixels, ordering=ordering), composed(model, pixels, ordering))
    assert not torch.allclose(plain, model(pixels, ordering=ordering))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(20, 20), (25, 15), (20, 35)])
def test_a_curve_through_the_patches_moves_them_and_no_position(kind, size):
    pixels, order = images(*size), hilbert_order((size[0] // 5, size[1] // 5))
    curved, plain = model_of(ordering="hilbert", **KINDS[kind]), model_of(**KINDS[kind])
    assert all(torch.equal(a, b) for a, b in zip(curved.parameters(), plain.parameters(), strict=True))
    logits = curved(pixels)
    torch.testing.assert_close(logits, composed(plain, pixels, order))
    assert torch.equal(logits, plain(pixels, ordering=order))
    assert not torch.allclose(logits, plain(pixels))
    # an order that is handed in counts more than the configuration's
    rows = torch.arange(len(order))
    torch.testing.assert_close(curved(pixels, ordering=rows), plain(pixels))


@pytest.mark.parametrize("kind", KINDS)
def test_where_every_patch_sees_every_other_the_curve_changes_nothing(kind):
    """So that what it changes is segments alone: learned positions and rotations follow the grid."""
    dense = {**KINDS[kind], "pattern": Pattern.dense()}
    pixels = images(25, 15)
    torch.testing.assert_close(model_of(ordering="hilbert", **dense)(pixels), model_of(**dense)(pixels))


def test_the_order_of_a_grid_is_made_once():
    first = vision._grid_order("hilbert", 9, 5, torch.device("cpu"))
    assert vision._grid_order("hilbert", 9, 5, torch.device("cpu")) is first
    assert torch.equal(first, hilbert_order((9, 5)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.long
def test_a_curved_model_compiles_without_a_break():
    model = model_of(ordering="hilbert", rotary="rope")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), model(images()))


def test_without_classes_it_gives_what_is_pooled():
    model = model_of(classes=0)
    assert model(images()).shape == (3, 16)
    torch.testing.assert_close(model(images()), composed(model, images()))


def over_ranks(group, kind, size, placement, recompute, curved=False):
    """Logits and gradients of a rank's part, summed over ranks, beside those of one process."""
    changes = {**KINDS[kind], "ordering": "hilbert" if curved else "raster"}
    model, pixels = model_of(recompute=recompute, **changes), images(*size)
    ordering = None
    if not curved:
        ordering = torch.randperm(size[0] * size[1] // 25, generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([3, 0, 4])
    expected = model(pixels, ordering=ordering)
    best = torch.autograd.grad(F.cross_entropy(expected, labels), list(model.parameters()))
    if curved:
        order = hilbert_order((size[0] // 5, size[1] // 5))
        torch.testing.assert_close(expected, composed(model, pixels, order), rtol=1e-10, atol=1e-10)
    context = made(group, placement)
    attach_context(model, context)
    embedded = []
    model.patch_embedding.register_forward_hook(lambda _, given, __: embedded.append(given[0].shape[1]))
    assert context.split({"pixels": pixels, "labels": labels}, {"pixels": None, "labels": None})["pixels"] is pixels
    logits = model(pixels, ordering=ordering)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    ranks = context.sequence_parallel_size
    # engines average gradients over ranks, all of which have the same loss
    result = torch.autograd.grad(F.cross_entropy(logits, labels), list(model.parameters()))
    for grad, right in zip(result, best, strict=True):
        dist.all_reduce(grad, group=group)
        torch.testing.assert_close(grad / ranks, right, rtol=1e-9, atol=1e-9)
    with context.whole():
        torch.testing.assert_close(model(pixels, ordering=ordering), expected)
    if ranks > 1:
        assert context.length == size[0] * size[1] // 25 + int(kind in ("class", "both"))
    return embedded


SPLIT = [
    ("mean", (20, 20), "contiguous", "nothing", False),
    ("mean", (25, 10), "zigzag", "all but attention", False),
    ("tokens", (25, 15), "contiguous", "everything", False),
    ("class", (20, 20), "contiguous", "nothing", False),
    ("both", (10, 35), "zigzag", "nothing", False),
    ("mean", (25, 15), "contiguous", "nothing", True),
    ("turned", (35, 20), "contiguous", "all but attention", True),
    ("both", (20, 25), "zigzag", "everything", True),
]


@pytest.mark.parametrize(
    ("kind", "size", "placement", "recompute", "curved"),
    tiered(SPLIT, quick=[SPLIT[1]], full=[SPLIT[0], SPLIT[2], SPLIT[4], SPLIT[5]]),
)
def test_ranks_share_the_patches_of_an_image(pool, kind, size, placement, recompute, curved):
    many = size[0] * size[1] // 25
    extra = kind in ("class", "both")
    for world in (1, 2, 4):
        embedded = pool.run(world, over_ranks, kind, size, placement, recompute, curved)
        assert all(whole == many + extra for _, whole in embedded)
        parts = [part for part, _ in embedded]
        assert sum(parts) == many + extra
        assert max(parts) <= -(-(many + extra) // world) + 1


def begun(group):
    context = made(group)
    with pytest.raises(ValueError, match="at least one token for each of the 2 ranks that share them, got 1"):
        context.begin_sequences(1)
    here = context.begin_sequences(5)
    assert context.is_split
    assert context.length == 5
    x = torch.full((2, 3), float(context.sequence_parallel_rank + 1)).half().requires_grad_()
    total = context.sum_parts(x)
    total.sum().backward()
    with context.whole():
        assert len(context.begin_sequences(5)) == 5
        assert not context.is_split
        assert context.sum_parts(x) is x
    assert context.is_split
    # one of several tensors is enough to split by, and where none is known the error stays
    mixed = context.split({"a": torch.zeros(2, 6), "b": torch.zeros(2)}, {"a": 1, "b": None})
    with pytest.raises(ValueError, match="nothing is known of"):
        context.split({"a": torch.zeros(2, 6)}, {"b": None})
    with pytest.raises(ValueError, match="no tensor with a sequence"):
        context.split({"a": torch.tensor(1)})
    context.check_same({"a": torch.zeros(2)}, {"a": None})
    with pytest.raises(ValueError, match="must be given the same batches"):
        context.check_same({"a": torch.full((2,), float(context.sequence_parallel_rank))}, {"a": None})
    return here.tolist(), total.tolist(), x.grad.tolist(), mixed["a"].shape[1]


def test_a_model_begins_the_sequences_that_it_makes(pool):
    (first, *rest), (second, *others) = pool.run(2, begun)
    assert first + second == list(range(5))
    assert rest == others == [[[3.0] * 3] * 2, [[2.0] * 3] * 2, 3]


class Mean(torch.nn.Module):
    """An attention of one's own: every token sees the mean."""

    def __init__(self, dim, heads, pattern):
        super().__init__()
        self.map = torch.nn.Linear(dim, dim)

    def forward(self, x, **options):
        return self.map(x.mean(1, keepdim=True)).expand_as(x)


def test_layers_may_have_a_class_of_their_own():
    model = model_of(attention={"class_path": f"{__name__}.Mean"})
    attach_context(model, SequenceContext())
    torch.testing.assert_close(model(images()), composed(model, images()))


def test_one_process_may_hand_down_a_context(pool):
    model, context = model_of(), SequenceContext()
    expected = model(images())
    attach_context(model, context)
    assert torch.equal(model(images()), expected)
    assert context.length == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 21}, "image_size must be a multiple of patch_size, got 21 and 5"),
        ({"patch_size": 0}, "patch_size must be a positive integer, got 0"),
        ({"classes": -1}, "classes must be an integer, at least 0, got -1"),
        ({"pooling": "max"}, "pooling must be one of 'mean', 'class', got 'max'"),
        ({"normed": "none"}, "normed must be one of 'pooled', 'tokens', got 'none'"),
        ({"final_norm_eps": 0}, "final_norm_eps must be a positive, finite number, got 0"),
        ({"resize_offset": 1}, "resize_offset must be at least 0 and less than 1, got 1"),
        ({"layers": 0}, "layers must be a positive integer, got 0"),
        ({"ordering": "peano"}, "ordering must be one of 'raster', 'hilbert', got 'peano'"),
        (
            {"ordering": "hilbert", "pattern": Pattern.window(4) + Pattern.dilated((8,), (2,), is_causal=True)},
            "pattern must not be causal where ordering is 'hilbert'",
        ),
    ],
)
def test_configurations_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LongViTConfig(**{**SMALL, **changes})


def test_a_configuration_of_images_is_plain_values():
    config = LongViTConfig(**{**SMALL, **KINDS["both"]}, ordering="hilbert")
    options = yaml.safe_load(yaml.safe_dump(config.to_dict()))
    assert options["ordering"] == "hilbert"
    assert LongViTConfig(**options) == config
    assert LongViTConfig(**SMALL).ordering == "raster"


@pytest.mark.parametrize(
    ("shape", "ordering", "message"),
    [
        ((1, 3, 20, 20), None, r"pixels must be \(batch, 2, height, width\), got shape \(1, 3, 20, 20\)"),
        ((2, 20, 20), None, r"pixels must be \(batch, 2, height, width\), got shape \(2, 20, 20\)"),
        ((1, 2, 20, 22), None, "pixels must be multiples of patch_size 5 high and wide, got 20 x 22"),
        ((1, 2, 0, 20), None, "pixels must be multiples of patch_size 5 high and wide, got 0 x 20"),
        ((1, 2, 10, 10), torch.arange(5), r"ordering must be a permutation of the 4 patches, .* got \(5,\)"),
        ((1, 2, 10, 10), torch.tensor([0, 1, 1, 3]), "ordering must name each of the 4 patches once"),
        ((1, 2, 10, 10), torch.tensor([0, 1, 2, 4]), "ordering must name each of the 4 patches once, got 4"),
        ((1, 2, 10, 10), [0, 1, 2, 3], "ordering must be a permutation of the 4 patches, .* got list"),
    ],
)
def test_images_and_orderings_that_do_not_fit_are_refused(shape, ordering, message):
    with pytest.raises(ValueError, match=message):
        model_of()(torch.zeros(shape, dtype=torch.float64), ordering=ordering)
