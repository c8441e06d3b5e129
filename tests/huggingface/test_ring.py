"""Models of transformers with `attn_implementation="ring"`: parts of sequences give what one process gives."""

from functools import lru_cache
from itertools import product

import pytest
import torch
from architectures import (
    ARCHITECTURES,
    LENGTH,
    ROUNDED,
    batch,
    document_lengths,
    largest_differences,
    model,
    relative,
    split_step,
    whole_step,
)
from tiers import tiered

KINDS = ("plain", "packed", "padded")
EXACT = 1e-12
QUICK = [
    ("Llama", "packed", 2, "zigzag", "gather"),
    ("Mistral", "padded", 2, "contiguous", "ring"),
    ("gpt-oss", "packed", 2, "contiguous", "swap"),
    ("DeepSeek-V3", "plain", 2, "zigzag", "swap"),
    ("Llama 4", "packed", 4, "contiguous", "gather"),
]
# each architecture once, in ways that differ from one to the next; test_matrix.py has all cases
ONCE = [
    (name, KINDS[i % 3], (2, 4)[i % 2], ("contiguous", "zigzag")[i // 2 % 2], ("gather", "ring")[i // 3 % 2])
    for i, name in enumerate(ARCHITECTURES)
]


@lru_cache(64)
def expected(name, kind):
    return whole_step(name, kind)


def assert_equal(name, kind, parts, tolerance=EXACT):
    for each, difference in largest_differences(expected(name, kind), parts, kind).items():
        is_rounded = name in ROUNDED and ROUNDED[name] in each
        assert difference < (max(tolerance, 1e-6) if is_rounded else tolerance), f"{each}: {difference:.1e}"


@pytest.mark.parametrize(
    ("name", "kind", "world", "placement", "exchange"),
    tiered({**dict.fromkeys(QUICK), **dict.fromkeys(ONCE)}, QUICK),
)
def test_parts_give_what_one_process_gives(pool, name, kind, world, placement, exchange):
    assert_equal(name, kind, pool.run(world, split_step, name, kind, placement, exchange))


@pytest.mark.parametrize(("name", "kind"), tiered(product(ARCHITECTURES, KINDS), [("Gemma 3", "packed")], covers=1))
def test_one_process_gives_what_transformers_gives(name, kind):
    logits, loss, gradients = whole_step(name, kind, "ring")
    true_logits, true_loss, true_gradients = expected(name, kind)
    read = batch(kind).get("attention_mask", torch.ones(logits.shape[:2])).bool()
    assert relative(logits[read], true_logits[read]) < EXACT
    assert relative(loss, true_loss) < EXACT
    for each, gradient in true_gradients.items():
        assert relative(gradients[each], gradient) < EXACT, each


@pytest.mark.parametrize("name", tiered(ARCHITECTURES, ["Gemma 2"]))
def test_transformers_eager_attention_gives_the_same(name):
    """Eager attention rounds its softmax to float32, and so does not serve as the reference of the other tests."""
    logits, loss, _ = whole_step(name, "plain", "ring")
    true_logits, true_loss, _ = whole_step(name, "plain", "eager")
    assert relative(logits, true_logits) < 1e-5
    assert relative(loss, true_loss) < 1e-6


def checkpointed(net):
    net.train()
    net.gradient_checkpointing_enable({"use_reentrant": False})


def test_layers_that_are_computed_again_give_the_same(pool):
    parts = pool.run(2, split_step, "Gemma 3", "packed", "zigzag", "gather", None, checkpointed)
    assert_equal("Gemma 3", "packed", parts)


def test_documents_of_the_batch_serve_without_positions_that_restart(pool):
    """A model whose positions go on through a row, as in pretraining, attends within documents all the same."""
    ids = torch.arange(3).repeat_interleave(torch.tensor([19, 1, 33]))[None]
    parts = pool.run(2, split_step, "Llama", "packed", "contiguous", "gather", {"documents": ids})
    assert_equal("Llama", "packed", parts)
    positions = torch.arange(53)[None]
    parts = pool.run(2, split_step, "Llama", "packed", "zigzag", "ring", {"documents": ids, "position_ids": positions})
    # rotations depend on distances alone, up to their rounding in float32
    assert_equal("Llama", "packed", parts, 1e-4)


def test_lengths_and_numbers_of_documents_change_nothing():
    """Which collators that pack rows give besides position_ids that restart, for kernels of CUDA and convolutions."""
    tensors = batch("packed")
    lengths = torch.tensor(document_lengths(LENGTH))
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    given = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 33, "max_length_k": 33}
    given["seq_idx"] = torch.arange(3).repeat_interleave(lengths)[None].int()
    for name in ("Llama", "Mistral"):
        inputs = {each: tensors[each] for each in ("input_ids", "position_ids")}
        with torch.no_grad():
            logits = model(name, "ring")(**inputs, **given, use_cache=False).logits
        assert relative(logits, expected(name, "packed")[0]) < EXACT
